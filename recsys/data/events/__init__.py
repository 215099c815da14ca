"""Makes a dataset of event logs, by SQL of DuckDB or Spark and numpy code over sorted batches."""
