"""Continual training: one partition after another, each scored before it is trained on.

`partitions` lists the folders in order, `queue` chooses the next and refuses what would break the
order, `scoring` scores a partition with the model as it stands, `partition_run` trains on it as a
run of its own, and `walk` goes from one to the next, and waits for more.
"""
