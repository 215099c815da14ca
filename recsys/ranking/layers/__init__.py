"""recsys/ranking/layers"""
