"""Commands on item vectors: export, retrieval and semantic ids."""
