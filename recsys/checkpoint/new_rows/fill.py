"""Gives the rows of a job that no training step has updated the values of their table's rule.

`mean`: the mean of the trained rows. `content`: a ridge regression from the content vectors of
items to their rows, fitted to the trained rows of warm items (`COLD_BELOW` training rows or more),
gives rows to all other items with content; further rows, such as that of unknown ids, have the mean
of the trained rows. The moments of the rows stay zero. The next training step of an item goes on
from these values.

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
from recsys.checkpoint.new_rows.trained_counts import trained_counts
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

    rule: str  # mean or content
    num_trained: int  # trained rows, whose mean the others have
    num_made: int = 0  # rows that were made of content
    fitted: RidgeMap | None = None  # the map that made them; None if there was nothing to fit

    def __str__(self) -> str:
        """Describe the values in a line."""
        if not self.num_trained:
            return "initial values, as no row was trained before"
        mean = f"the mean of {self.num_trained:,} trained rows"
        if self.rule == "mean":
            return mean
        if self.fitted is None:
            return f"{mean}, as no trained item has {COLD_BELOW} training rows"
        fitted = self.fitted
        words = f"{self.num_made:,} made of content by {fitted.num_pairs:,} rows of warm items"
        if fitted.mean_error > 0:
            words += f" (left-out error {fitted.error / fitted.mean_error:.3f} of the mean's)"
        return f"{words}, others {mean}"


def fill_new_rows(job: Job, counts: ItemCounts) -> dict[str, FilledRows]:
    """Apply the rules of all tables, and return what was filled, by table. A collective.

    Args:
        job: the job, with its optimizer state, which tells the trained rows, and the vectors of its
            items in the memory bank.
        counts: training rows of each item so far.
    """
    filled = {}
    for table, rule in cold_row_rules(job.config, job.schema).items():
        rows = TableRows(job.model, table, job.ranks.group)
        mean, num_trained = rows.mean()
        filled[table] = FilledRows(rule, num_trained)
        if not num_trained:
            continue
        rows.fill_untrained(mean)
        if rule == "content":
            filled[table] = _make_of_content(job, rows, counts, num_trained)
    return filled


def refill_new_rows(job: Job, run: Path) -> None:
    """Apply the rules with the counts of a run in training. A collective.

    Raises:
        ValueError: on every rank: the counts cannot be read.
    """
    if not cold_row_rules(job.config, job.schema):
        return
    with job.ranks.raise_on_all_ranks():
        counts = trained_counts(run, job.schema.item_id_limit)
    for table, filled in fill_new_rows(job, counts).items():
        logger.info("table '%s': rows without training: %s", table, filled)


def require_table_state(job: Job, checkpoint: Path | None) -> None:
    """Refuse to go on from a best model alone, which has no moments to tell trained rows by.

    Raises:
        ValueError: a table has a rule; names its setting.
    """
    if checkpoint is None and (rules := cold_row_rules(job.config, job.schema)):
        raise ValueError(
            f"embedding.tables.{next(iter(rules))}.new_rows: the run has its best model only, "
            "without the optimizer state that tells trained rows from others; bring back its last "
            "checkpoint, or train anew with --overwrite true"
        )


def fill_rows_of_later_items(job: Job, run: Path) -> None:
    """Make rows of content for items that the data's map has beyond that of the run. A collective.

    For a loaded model, on data whose map was extended after training. Items that the run knows have
    their rows in its checkpoint.

    Raises:
        ValueError: on every rank: counts or map of the run cannot be read.
    """
    item = job.schema.target_item
    known = job.schema.vocabularies.get(item)
    is_made = cold_row_rules(job.config, job.schema).get(item) == "content"
    if not is_made or not isinstance(known, ExactVocabulary):
        return
    with job.ranks.raise_on_all_ranks():
        file = vocabulary_file(Location.of(run), item)
        of_run = len(ExactVocabulary.load(file.path, known.num_embeddings))
        counts = trained_counts(run, job.schema.item_id_limit)
    if of_run == len(known):
        return
    rows = TableRows(job.model, item, job.ranks.group, lambda a, b: np.arange(a, b) < of_run)
    filled = _make_of_content(job, rows, counts, of_run)
    if job.ranks.is_first:
        logger.info("%s: rows of items after training: %s", job.root, filled)


def _make_of_content(job: Job, rows: TableRows, counts: ItemCounts, num_trained: int) -> FilledRows:
    """Fit the map to warm items, and write the rows that it gives to new ones. A collective."""
    content, store, ranks = job.em3.content, job.store, job.ranks
    assert content is not None and store is not None
    xs, ys, new_items = [], [], []
    items = np.sort(store.items.ids)
    for start in range(0, len(items), BLOCK_ROWS):
        block = items[start : start + BLOCK_ROWS]
        values, is_trained = rows.read(torch.from_numpy(block))
        seen = is_trained.numpy()
        new_items.append(block[~seen])
        learned = np.flatnonzero(seen & (counts.of(block) >= COLD_BELOW))
        mine = np.array_split(learned, ranks.world_size)[ranks.rank]
        xs.append(item_vectors(content, store, ranks, block[mine]))
        ys.append(values[torch.from_numpy(mine)])
    fitted = fit_ridge(torch.cat(xs), torch.cat(ys), ranks.group)
    new = np.concatenate(new_items)
    if fitted is None:
        return FilledRows("content", num_trained)
    for start in range(0, len(new), BLOCK_ROWS):
        block = new[start : start + BLOCK_ROWS]
        share = np.array_split(block, ranks.world_size)[ranks.rank]
        made: Tensor = fitted(item_vectors(content, store, ranks, share)).float()
        rows.write(torch.from_numpy(block), gather_rows(made, ranks.group))
    return FilledRows("content", num_trained, len(new), fitted)
