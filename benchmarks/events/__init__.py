"""`recsys prepare events` at scale, beside the same dataset by plain SQL and by Polars."""
