"""recsys/data/parquet"""
