"""data/items"""
