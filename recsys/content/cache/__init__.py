"""Disk cache of the outputs of frozen encoder layers, one entry per item."""
