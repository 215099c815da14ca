"""Serving: a run as a package of files, and a scorer that answers requests from it."""
