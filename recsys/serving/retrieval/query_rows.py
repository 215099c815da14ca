"""Query rows, whose first label is positive: histories, candidates and positions of their targets.

Shapes: R rows with a query, I items of the catalogue, S history items of all rows, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_matrix

from recsys.build import Job
from recsys.config.ranking import RetrievalSettings
from recsys.data.item_frequency import ItemCounts, target_counts
from recsys.evaluation.availability import LaterItems, later_items
from recsys.evaluation.evaluate import score, split_interactions
from recsys.evaluation.retrieval import TIE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryRows:
    """Rows whose first label is positive, with their users' histories and query vectors."""

    targets: np.ndarray  # int64 [R], positions in the catalogue
    histories: np.ndarray  # int64 [S], positions or -1, oldest first
    lengths: np.ndarray  # int64 [R], of the histories
    queries: np.ndarray  # float32 [R, D] of the model
    counts: np.ndarray  # int64 [R], training rows of the targets
    users: np.ndarray  # int64 [R]
    weights: torch.Tensor | None = None  # float32 [R] in metrics; None: each row counts as one
    later: LaterItems | None = None  # items that are no candidates of rows; None: all always are

    def take(self, rows: np.ndarray) -> QueryRows:  # positions
        lengths = self.lengths[rows]
        first = (self.lengths.cumsum() - self.lengths)[rows] - (lengths.cumsum() - lengths)
        return QueryRows(
            self.targets[rows],
            self.histories[np.repeat(first, lengths) + np.arange(lengths.sum())],
            lengths,
            self.queries[rows],
            self.counts[rows],
            self.users[rows],
            None if self.weights is None else self.weights[rows],
            None if self.later is None else replace(self.later, rows=self.later.rows[rows]),
        )

    def sample(self, limit: int) -> QueryRows:
        """Return at most `limit` evenly spaced rows: adjacent ones share a user or a moment."""
        return self.take(
            np.linspace(0, len(self.targets) - 1, min(limit, len(self.targets)), dtype=int)
        )

    def blocks(self, size: int) -> Iterator[QueryRows]:
        for first in range(0, len(self.targets), size):
            yield self.take(np.arange(first, min(first + size, len(self.targets))))

    def history_weights(self, num_items: int, decay: float) -> csr_matrix:  # [R, I]
        """Return the weights of the items of each history, which add up to 1."""
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        ages = np.repeat(self.lengths.cumsum(), self.lengths) - 1 - np.arange(len(self.histories))
        weights = np.where(self.histories >= 0, decay ** ages.astype(np.float64), 0)
        totals = np.bincount(rows, weights, len(self.lengths))
        shares = (weights / np.maximum(totals[rows], np.finfo(float).tiny)).astype(np.float32)
        cells = rows, self.histories.clip(min=0)
        return csr_matrix((shares, cells), shape=(len(self.lengths), num_items))


def other_candidates(rows: QueryRows, num_items: int, exclude_seen: bool) -> np.ndarray:
    """Return which items compete with each row's target, bool [R, I].

    Items that appeared later do not, nor with `exclude_seen` those of the history.
    """
    row = np.arange(len(rows.targets))
    is_candidate = np.ones((len(row), num_items), bool)
    if exclude_seen:
        owner, is_item = np.repeat(row, rows.lengths), rows.histories >= 0
        is_candidate[owner[is_item], rows.histories[is_item]] = False
    if rows.later is not None:
        is_candidate &= ~rows.later.mask(slice(None), rows.later.items).numpy()
    is_candidate[row, rows.targets] = False
    return is_candidate


def rank_rows(
    scores: np.ndarray, rows: QueryRows, exclude_seen: bool
) -> tuple[np.ndarray, np.ndarray]:  # float32 [R, I] -> int64 [R], int64 [R]
    """Count the other candidates with a higher and an equal score."""
    return rank_among(scores, rows.targets, other_candidates(rows, scores.shape[1], exclude_seen))


def rank_among(
    scores: np.ndarray, targets: np.ndarray, is_other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # float32 [R, I], int64 [R], bool [R, I] -> int64 [R] twice
    """Count the items of `is_other` with a higher, and with an equal score."""
    target = scores[np.arange(len(scores)), targets].reshape(-1, 1)
    margin = TIE * np.abs(target)
    above = ((scores > target + margin) & is_other).sum(axis=1)
    return above, ((scores >= target - margin) & is_other).sum(axis=1) - above


def index_of(items: np.ndarray, ids: np.ndarray) -> np.ndarray:  # ascending [I], [N] -> int64 [N]
    """Return the index of each id among the items, or -1."""
    indices = np.searchsorted(items, ids).clip(max=len(items) - 1)
    return np.where(items[indices] == ids, indices, -1)


def read_query_rows(job: Job, split: str, items: np.ndarray, counts: ItemCounts) -> QueryRows:
    """Return the query rows of a split whose target is in the catalogue."""
    interactions, settings = split_interactions(job, split), job.config.ranking
    outputs = score(job, interactions, with_queries=True, with_histories=True)
    scored = {name: column.numpy() for name, column in outputs.items()}
    targets = index_of(items, scored["query_items"])
    with_item = np.flatnonzero(targets >= 0)
    if num_other := len(targets) - len(with_item):
        logger.warning(
            f"{job.root / split}: {num_other:,} rows ask for items without a row in "
            "items/*.parquet and are left out"
        )
    rows = QueryRows(
        targets=targets,
        histories=index_of(items, scored["query_seen"]),
        lengths=scored["query_seen_lengths"],
        queries=scored["queries"].astype(np.float32),
        counts=target_counts(counts, scored["query_items"], job.schema),
        users=scored["query_groups"],
        weights=outputs.get("query_weights"),
    ).take(with_item)
    assert isinstance(settings, RetrievalSettings)
    positions = outputs["query_positions"][with_item]
    return replace(rows, later=later_items(job, settings, interactions.rows, positions))
