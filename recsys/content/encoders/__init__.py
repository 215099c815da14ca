"""Encoders: the prepared content of items -> tokens for the fusion; frozen, adapted or trained."""
