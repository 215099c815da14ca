"""embeddings/vocabulary"""
