"""Make a dataset of event logs, with SQL of DuckDB or Spark, and numpy code on sorted batches."""
