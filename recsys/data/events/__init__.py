"""Makes a dataset of event logs: labels, histories, counts, splits and vocabularies.

One transformation for two engines. What is relational is plain SQL that DuckDB and Spark both
read; what depends on the order of events (histories, counts, drawn negatives) is numpy code over
Arrow batches sorted by key and time, which costs a sort and never the square of a user's events.
"""
