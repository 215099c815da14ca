"""Reads the files of logs and tables."""
