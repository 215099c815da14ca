"""data/movielens"""
