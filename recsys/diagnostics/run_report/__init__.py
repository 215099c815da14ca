"""Writes one HTML page that shows what a run has learned, readable without network."""
