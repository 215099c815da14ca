"""First values of table rows that no training step has updated, by their table's `new_rows`.

`zero` is 0, `mean` the mean of the trained rows. `content` is a ridge regression from content
vectors, fitted to items with `COLD_BELOW` training rows or more. Moments of the rows stay zero.
`item_counts_before.npy` keeps the counts of earlier runs, by the rows of the new run.
Shapes: U items of a block, E width of content vectors, D dimension.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embeddings.ridge import RidgeMap, fit_ridge
from embeddings.table_rows import BLOCK_ROWS, TableRows
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.run_folder import ITEM_COUNTS, ITEM_COUNTS_BEFORE, read_item_counts
from recsys.checkpoint.warm_start.plan import WarmStartPlan
from recsys.content.item_vectors import item_vectors
from recsys.data.item_frequency import COLD_BELOW, ItemCounts
from recsys.data.schema import vocabulary_file
from recsys.distributed.gather import gather_rows
from recsys.model.tables import cold_row_rules
from recsys.storage.location import Location

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilledRows:
    """Rows of a table that got values by a rule."""

    rule: str  # zero, mean or content
    num_trained: int  # trained rows, whose mean the others have
    num_made: int = 0  # rows that were made of content
    ridge: RidgeMap | None = None  # the map that made them; None if there was nothing to fit

    def __str__(self) -> str:
        if not self.num_trained:
            return "initial values, as no row was trained before"
        if self.rule == "zero":
            return "zeros"
        mean = f"the mean of {self.num_trained:,} trained rows"
        if self.rule == "mean":
            return mean
        if self.ridge is None:
            return f"{mean}, as no trained item has {COLD_BELOW} training rows"
        text = f"{self.num_made:,} made of content by {self.ridge.num_pairs:,} rows of warm items"
        if self.ridge.mean_error > 0:
            share = self.ridge.error / self.ridge.mean_error
            text += f" (left-out error {share:.3f} of the mean's)"
        return f"{text}, others {mean}"


def fill_cold_rows(job: Job, counts: ItemCounts) -> dict[str, FilledRows]:
    """Apply the rules of all tables, and return what was filled, by table. A collective."""
    filled = {}
    for table, rule in cold_row_rules(job.config, job.schema).items():
        rows = TableRows(job.model, table, job.ranks.group)
        mean, num_trained = rows.mean()
        filled[table] = FilledRows(rule, num_trained)
        if not num_trained:
            continue
        rows.fill_untrained(torch.zeros_like(mean) if rule == "zero" else mean)
        if rule == "content":
            filled[table] = _fill_from_content(job, rows, counts, num_trained)
    return filled


def refill_cold_rows(job: Job, run: Path) -> None:
    """Apply the rules with the counts of a run in training. A collective."""
    if not cold_row_rules(job.config, job.schema):
        return
    with job.ranks.raise_on_all_ranks():
        counts = trained_counts(run, job.schema.item_id_limit)
    for table, filled in fill_cold_rows(job, counts).items():
        logger.info("table '%s': rows without training: %s", table, filled)


def require_table_state(job: Job, checkpoint: Path | None) -> None:
    """Raise a ValueError for a table with a rule if no optimizer state tells its trained rows."""
    if checkpoint is None and (rules := cold_row_rules(job.config, job.schema)):
        raise ValueError(
            f"embedding.tables.{next(iter(rules))}.new_rows: the run has its best model only, "
            "without the optimizer state that tells trained rows from others; bring back its last "
            "checkpoint, or train anew with --overwrite"
        )


def fill_rows_of_later_items(job: Job, run: Path) -> None:
    """Make rows of content for items of the data's map that the run's map lacks. A collective."""
    item = job.schema.target_item
    vocabulary = job.schema.vocabularies.get(item)
    is_made = cold_row_rules(job.config, job.schema).get(item) == "content"
    if not is_made or not isinstance(vocabulary, ExactVocabulary):
        return
    with job.ranks.raise_on_all_ranks():
        file = vocabulary_file(Location.of(run), item)
        num_trained = len(ExactVocabulary.load(file.path, vocabulary.num_embeddings))
        counts = trained_counts(run, job.schema.item_id_limit)
    if num_trained == len(vocabulary):
        return
    rows = TableRows(job.model, item, job.ranks.group, lambda a, b: np.arange(a, b) < num_trained)
    filled = _fill_from_content(job, rows, counts, num_trained)
    if job.ranks.is_first:
        logger.info("%s: rows of items after training: %s", job.root, filled)


def _fill_from_content(
    job: Job, rows: TableRows, counts: ItemCounts, num_trained: int
) -> FilledRows:
    """Fit the map to warm items, and write the rows that it gives to new ones. A collective."""
    content, store, ranks = job.em3.content, job.store, job.ranks
    assert content is not None and store is not None
    xs, ys, untrained = [], [], []
    items = np.sort(store.items.ids)
    for start in range(0, len(items), BLOCK_ROWS):
        block = items[start : start + BLOCK_ROWS]
        values, is_trained = rows.read(torch.from_numpy(block))
        untrained.append(block[~is_trained.numpy()])
        warm = np.flatnonzero(is_trained.numpy() & (counts.of(block) >= COLD_BELOW))
        share = np.array_split(warm, ranks.world_size)[ranks.rank]
        xs.append(item_vectors(content, store, ranks, block[share]))
        ys.append(values[torch.from_numpy(share)])
    ridge = fit_ridge(torch.cat(xs), torch.cat(ys), ranks.group)
    new_items = np.concatenate(untrained)
    if ridge is None:
        return FilledRows("content", num_trained)
    for start in range(0, len(new_items), BLOCK_ROWS):
        block = new_items[start : start + BLOCK_ROWS]
        share = np.array_split(block, ranks.world_size)[ranks.rank]
        rows_from_content: Tensor = ridge(item_vectors(content, store, ranks, share)).float()
        rows.write(torch.from_numpy(block), gather_rows(rows_from_content, ranks.group))
    return FilledRows("content", num_trained, len(new_items), ridge)


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
