"""Values of rows that no training step has updated, by the rule `new_rows` of their table.

`fill` applies the rules to a job, `trained_counts` keeps how often each item was trained in a run
and in those that it was warm-started from.
"""
