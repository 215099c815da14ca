"""Engines that run the stages: DuckDB on one machine, Spark on a cluster."""
