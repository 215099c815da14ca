"""content/cache"""
