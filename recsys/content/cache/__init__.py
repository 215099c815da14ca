"""Keeps the outputs of frozen encoder layers on disk, one per item, and reuses them."""
