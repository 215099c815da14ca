"""EM3: the one model that is sharded and trained, its losses, tables and precision."""
