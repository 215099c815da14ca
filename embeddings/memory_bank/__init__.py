"""embeddings/memory_bank"""
