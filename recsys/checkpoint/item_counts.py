"""Training rows of each item, in a run and in those that it was started from.

`item_counts_before.npy` keeps the counts of earlier runs, by the rows of the new run.
"""

from __future__ import annotations

from pathlib import Path

from recsys.build import Job
from recsys.checkpoint.run_folder import ITEM_COUNTS, ITEM_COUNTS_BEFORE, read_item_counts
from recsys.checkpoint.warm_start.plan import WarmStartPlan
from recsys.data.item_frequency import ItemCounts


def trained_counts(run: Path, num_items: int | None) -> ItemCounts:
    """Return the training rows of each item, in a run and before it; damage is a ValueError."""
    has_earlier = (run / ITEM_COUNTS_BEFORE).exists()
    names = [ITEM_COUNTS, ITEM_COUNTS_BEFORE] if has_earlier else [ITEM_COUNTS]
    return ItemCounts.sum_of([read_item_counts(run, num_items, name) for name in names])


def counts_before(job: Job, plan: WarmStartPlan) -> ItemCounts:
    """Return the counts of the run started from, by new rows; maybe none. A collective."""
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
