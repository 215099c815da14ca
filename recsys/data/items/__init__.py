"""Reads the catalogue: texts, images and features of items, prepared once and kept on disk."""
