"""EM3: the model that is sharded and trained, its losses, tables and precision."""
