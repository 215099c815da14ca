"""Makes a dataset of event logs: labels, histories, counts, splits and vocabularies.

One transformation for two engines. Joins and filters are plain SQL that DuckDB and Spark both read.
Histories, counts and drawn negatives depend on the order of events: numpy code makes them over
Arrow batches sorted by key and time. That costs a sort, and never the square of a user's events.
"""
