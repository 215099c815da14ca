"""Writes datasets of complete samples."""
