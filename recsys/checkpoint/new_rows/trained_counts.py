"""Counts each item's training rows, in a run and in the runs it was started from.

A run counts its own training rows (`item_counts.npy`), which decide what is cold in its reports. An
item that was trained well before a warm start need not occur again, so the sums of the runs before
are kept beside them, by the rows of the new run.
"""

from __future__ import annotations

from pathlib import Path

from recsys.build import Job
from recsys.checkpoint.run_folder import ITEM_COUNTS, ITEM_COUNTS_BEFORE, read_item_counts
from recsys.checkpoint.warm_start.plan import WarmStartPlan
from recsys.data.item_frequency import ItemCounts


def trained_counts(run: Path, num_items: int | None) -> ItemCounts:
    """Return the training rows of each item, in a run and before it.

    Raises:
        ValueError: a file is missing or damaged.
    """
    names = [ITEM_COUNTS]
    if (run / ITEM_COUNTS_BEFORE).exists():
        names.append(ITEM_COUNTS_BEFORE)
    return ItemCounts.sum_of([read_item_counts(run, num_items, name) for name in names])


def counts_before(job: Job, plan: WarmStartPlan) -> ItemCounts:
    """Return the counts of the run that a new run starts from, by the rows of the new one.

    There are none if the item table is not taken over. A collective.
    """
    source = plan.source
    with job.ranks.raise_on_all_ranks():
        rows = plan.maps.get(job.schema.target_item)
        if rows is None:
            return ItemCounts.sum_of([])
        counts = trained_counts(source.request.run, source.schema.item_id_limit)
        if rows.is_identity or job.schema.has_bounded_items:  # counted by raw id
            return counts
        items = rows.new_rows(counts.items)
        return ItemCounts.sum_of([ItemCounts(items[items >= 0], counts.counts[items >= 0])])


def keep_counts_before(run: Path, job: Job, plan: WarmStartPlan) -> None:
    """Keep `counts_before` in a new run, whose own counts are of its data alone. A collective."""
    counts = counts_before(job, plan)
    with job.ranks.raise_on_all_ranks():
        if job.ranks.is_first and plan.maps.get(job.schema.target_item) is not None:
            counts.save(run / ITEM_COUNTS_BEFORE)
