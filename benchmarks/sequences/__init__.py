"""Benchmarks of the sequence models: steps by length of history, and forms of their attention."""
