"""Read the rows of Parquet files by position: columns, order, checks and bad rows."""
