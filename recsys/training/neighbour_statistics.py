"""Statistics of `recsys.ranking.neighbours`: factors of the items' similarities, means of values.

An event is a user and an item in the histories of the user's training rows, counted once. Rank 0
computes statistics of the distinct events of all ranks: for each fold, of the users outside it.

Shapes: N events, I items, K neighbours of an item, D width of a factor, F folds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from recsys.build import Job
from recsys.config import NeighbourSettings
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.moments import row_moments
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import RAW_GROUP, ROW_POSITION
from recsys.data.row_source import RowSource, open_rows
from recsys.data.schema import Schema
from recsys.distributed.gather import gather_rows_to_first
from recsys.ranking.neighbours import FOLDS, PRIOR_VALUES, Neighbours

if TYPE_CHECKING:  # runs without neighbours start without it
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

EVENTS_PER_BLOCK = 2**24  # events that a rank holds before it drops duplicates
ITEMS_PER_BLOCK = 4096  # items whose similarities to all items are in memory at a time
OVERSAMPLING, ITERATIONS = 16, 8  # of the subspace iteration
MAX_EVENTS = 1000  # events of a user: the cost of their pairs grows with the square


class Events(NamedTuple):
    """Distinct events, ordered by user and item: int64 [N], float64 [N]."""

    users: np.ndarray
    items: np.ndarray
    values: np.ndarray
    blocks: np.ndarray  # of the first training row that has the event, -1 before all blocks

    def distinct(self) -> Events:
        """Return the earliest, then first, of the events that have the same user and item."""
        ordered = self.take(np.lexsort((self.blocks, self.items, self.users)))
        is_first = np.ones(len(ordered.users), bool)
        is_first[1:] = (np.diff(ordered.users) != 0) | (np.diff(ordered.items) != 0)
        return ordered.take(is_first)

    @staticmethod
    def joined(blocks: list[Events]) -> Events:
        return Events(*map(np.concatenate, zip(*blocks))).distinct()

    def take(self, rows: np.ndarray) -> Events:  # positions, or bool [N]
        return Events(*(column[rows] for column in self))

    def capped(self) -> Events:
        """Return at most `MAX_EVENTS` events of each user, chosen by a hash of the item."""
        hashed = self.items.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        order = np.lexsort((hashed, self.users))
        users = self.users[order]
        rank = np.arange(len(users)) - np.searchsorted(users, users)
        return self.take(np.sort(order[rank < MAX_EVENTS]))


def fit_neighbours(job: Job, earlier_folders: Sequence[str] = ()) -> None:
    """Fit neighbours to the training rows and the latest earlier folders. A collective."""
    neighbours, settings, ranks = job.em3.neighbours, job.config.neighbours, job.ranks
    if neighbours is None or settings is None:
        return
    folders = ranks.on_first(_existing, job, earlier_folders)
    starts = ranks.on_first(block_starts, job, settings)
    folders = [job.train_folder, *folders[-settings.partitions :]]
    events = gather_events(job, settings, folders, starts)
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            num_before = float(neighbours.value_counts[:, FOLDS].sum())  # of the run begun from
            if len(events.users) < num_before / 2:
                logger.warning(
                    f"neighbours: statistics of {len(events.users):,} events replace those of "
                    f"{num_before:,.0f}, and items without an event lose theirs; keep earlier "
                    "partitions in the data, raise neighbours.partitions, or train anew on all rows"
                )
            neighbours.block_starts[:] = -1 if starts is None else torch.from_numpy(starts)
            fill_statistics(neighbours, events, settings)
            logger.info(
                f"neighbours: {len(events.users):,} events of {len(np.unique(events.users)):,} "
                f"users and {len(np.unique(events.items)):,} items"
            )
    for name, buffer in neighbours.named_buffers():
        if not name.startswith("blend."):
            dist.broadcast(buffer, src=0, group=ranks.group)


def _existing(job: Job, folders: Sequence[str]) -> list[str]:
    return [folder for folder in folders if (job.root / folder).exists()]


def block_starts(job: Job, settings: NeighbourSettings) -> np.ndarray | None:  # int64 [F]
    """Return the positions of the first training row of each block; None if users are in folds."""
    if settings.time is None:
        return None
    source, on_bad_row = job.config.source, job.config.on_bad_row
    rows = open_rows(source, job.root, job.train_folder, job.schema, on_bad_row)
    reason = time_order_problem(rows, settings.time)
    if reason is not None:
        logger.warning(
            f"neighbours: {reason}; training rows read statistics of other users instead. "
            "Sort the files by time and name their column in neighbours.time, or set it to null"
        )
        return None
    logger.info(f"neighbours: training rows read statistics of earlier rows, by '{settings.time}'")
    return np.arange(FOLDS) * rows.num_rows // FOLDS


def time_order_problem(rows: RowSource, name: str) -> str | None:
    """Return why rows are not split by the moments in a column; None if they are in its order."""
    if not isinstance(rows, ParquetRows):
        return "the rows are no Parquet files, so that their order of time is unknown"
    try:
        moments, _ = row_moments(rows, name)
    except ValueError as error:
        return str(error)
    is_ordered = moments[1:] >= moments[:-1]  # False beside a null
    if is_ordered.all():
        return None
    pair = rows.describe_range(np.flatnonzero(~is_ordered)[:1] + np.arange(2))
    return f"{pair}: column '{name}' is null, or descends"


def gather_events(
    job: Job, settings: NeighbourSettings, folders: Sequence[str], starts: np.ndarray | None = None
) -> Events:
    """Return the distinct events of the rows in folders on rank 0. A collective.

    `starts` [F] are the first rows of the blocks of the first folder; None: without blocks. If an
    event has several values, the first by block, folder and row counts, for any number of ranks.
    """
    earlier = starts if starts is None else starts[:0]
    blocks = [starts, *[earlier] * (len(folders) - 1)]
    return _joined_in_blocks(
        _gathered(job, settings, folder, first_rows) for folder, first_rows in zip(folders, blocks)
    )


def _gathered(
    job: Job, settings: NeighbourSettings, folder: str, starts: np.ndarray | None
) -> Events:
    """Return the events of the rows in a folder on rank 0, none on the others. A collective."""
    ranks, schema = job.ranks, job.schema
    with ranks.raise_on_all_ranks():
        rows = open_rows(job.config.source, job.root, folder, schema, job.config.on_bad_row)
        tables = rows.read(*rows.share(ranks.rank, ranks.world_size))
        local = _joined_in_blocks(
            events_of_rows(table, schema, settings, starts) for table in tables
        )
    columns = [torch.from_numpy(column).to(ranks.device) for column in local]
    return Events(*(gather_rows_to_first(column, ranks.group).cpu().numpy() for column in columns))


def _joined_in_blocks(chunks: Iterable[Events]) -> Events:
    """Return the distinct events of chunks; drop duplicates before they fill the memory."""
    block = [Events(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float64, np.int64)))]
    for chunk in chunks:
        block.append(chunk)
        if sum(len(events.users) for events in block) > EVENTS_PER_BLOCK:
            block = [Events.joined(block)]
    return Events.joined(block)


def events_of_rows(
    table: pa.Table, schema: Schema, settings: NeighbourSettings, starts: np.ndarray | None = None
) -> Events:
    """Return the distinct events of the histories of some rows; padding rows have none.

    Unknown ids share a table row, which is no item. An event's block is that of its row by
    `starts`, -1 before the first, or 0 without `starts`.
    """
    rows = RowColumns.of(table)
    assert schema.history is not None
    lengths = rows.lengths(schema.history)
    users = rows.numbers[RAW_GROUP if RAW_GROUP in rows.numbers else schema.group]
    users = np.repeat(users.astype(np.int64), lengths)
    items = rows.values(schema.history).astype(np.int64)
    values = np.ones(len(items)) if settings.values is None else rows.values(settings.values)
    blocks = np.zeros(len(items), np.int64)
    if starts is not None:
        row_blocks = np.searchsorted(starts, rows.numbers[ROW_POSITION], side="right") - 1
        blocks = np.repeat(row_blocks, lengths)
    events = Events(users, items, values.astype(np.float64), blocks)
    vocabulary = schema.vocabulary_of(schema.history)
    if vocabulary is not None and vocabulary.kind == "exact":
        events = events.take(items != schema.limit(schema.history) - 1)
    return events.distinct()


def fill_statistics(neighbours: Neighbours, events: Events, settings: NeighbourSettings) -> None:
    """Compute all statistics of all events, of those before each block or outside each fold."""
    num_items, _, dim = neighbours.cooccurrence.shape
    if settings.values is not None:
        values = events.values if len(events.values) else np.zeros(1)
        neighbours.value_mean.fill_(values.mean())
        neighbours.value_deviation.fill_(values.std() or 1.0)
        scaled = (events.values - values.mean()) / (values.std() or 1.0)
        events = events._replace(values=scaled)
    has_blocks = neighbours.block_starts[0] >= 0
    for fold in range(FOLDS + 1):  # the last one has all events
        is_read = events.blocks < fold if has_blocks else events.users % FOLDS != fold
        subset = events.take(is_read)
        subset = subset._replace(values=user_deviations(subset, settings))
        sums = np.bincount(subset.items, subset.values, num_items)
        counts = np.bincount(subset.items, minlength=num_items)
        neighbours.value_sums[:, fold] = torch.from_numpy(sums)
        neighbours.value_counts[:, fold] = torch.from_numpy(counts)
        # Without values there is no second similarity.
        buffers = (neighbours.cooccurrence, dim), (neighbours.taste, settings.taste_dim)
        similarities = item_similarities(subset, num_items, settings)
        for (buffer, width), similarity in zip(buffers, similarities):
            buffer[:, fold] = torch.from_numpy(leading_factors(similarity, width))


def user_deviations(events: Events, settings: NeighbourSettings) -> np.ndarray:  # [N]
    """Return standardised values minus their user's mean, which includes `PRIOR_VALUES` zeros."""
    if settings.values is None or not len(events.values):
        return np.zeros(len(events.values))
    _, user = np.unique(events.users, return_inverse=True)
    means = np.bincount(user, events.values) / (np.bincount(user) + PRIOR_VALUES)
    return events.values - means[user]


def item_similarities(
    events: Events, num_items: int, settings: NeighbourSettings
) -> list[csr_matrix]:  # float32 [I, I] each, symmetric, 0 on the diagonal
    """Return the similarities of items by their users and, with values, by their users' values.

    The cosine of two items' vectors of users, 1 + length ** 2 in place of length ** 2 for values,
    times n / (n + `significance`) with n common users (Herlocker et al. 1999). A pair is kept if
    one is among the K neighbours of the other with the largest similarities in size.
    """
    from scipy.sparse import csr_matrix, vstack

    events = events.capped()
    _, user = np.unique(events.users, return_inverse=True)
    shape = num_items, user.max(initial=0) + 1
    columns = [np.ones(len(user))] + ([] if settings.values is None else [events.values])
    vectors = [
        csr_matrix((column.astype(np.float32), (events.items, user)), shape) for column in columns
    ]
    squares = [np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel() for matrix in vectors]
    scales = [1 / np.sqrt(np.maximum(part + (part is not squares[0]), 1e-9)) for part in squares]
    blocks: list[list[csr_matrix]] = [[] for _ in vectors]
    for start in range(0, num_items, ITEMS_PER_BLOCK):
        rows = slice(start, start + ITEMS_PER_BLOCK)
        common = vectors[0][rows] @ vectors[0].T
        weights = common.copy()
        weights.data /= weights.data + settings.significance
        for part, scale, nearest in zip(vectors, scales, blocks):
            products = common if part is vectors[0] else part[rows] @ part.T  # without zeros
            products.data *= np.repeat(scale[rows], np.diff(products.indptr))
            products.data *= scale[products.indices]
            similarity = products.multiply(weights).tocsr()
            nearest.append(_nearest(similarity, start, settings.neighbours_per_item))
    return [_symmetric(vstack(nearest).tocsr()) for nearest in blocks]


def _symmetric(nearest: csr_matrix) -> csr_matrix:
    both_ways = nearest.multiply(nearest.T.astype(bool))
    return (nearest + nearest.T - both_ways).astype(np.float32)


def _nearest(similarity: csr_matrix, first_item: int, count: int) -> csr_matrix:
    """Return the `count` largest absolute similarities of each row to other items."""
    from scipy.sparse import csr_matrix

    sizes = np.abs(similarity.data)
    is_near = sizes > 0
    for row, (start, end) in enumerate(pairwise(similarity.indptr)):
        is_near[start:end] &= similarity.indices[start:end] != first_item + row
        sizes[start:end] *= is_near[start:end]
        if (excess := end - start - count) > 0:
            is_near[start + np.argpartition(sizes[start:end], excess)[:excess]] = False
    ends = np.concatenate([[0], np.cumsum(is_near)])[similarity.indptr]
    return csr_matrix(
        (similarity.data[is_near], similarity.indices[is_near], ends), similarity.shape
    )


def leading_factors(similarity: csr_matrix, dim: int) -> np.ndarray:  # float32 [I, D]
    """Return Z such that Z Z' approximates the similarities: scaled leading eigenvectors.

    Many items use subspace iteration (Halko et al. 2011, algorithm 4.4), which takes seconds.
    """
    factors = np.zeros((similarity.shape[0], dim), np.float32)
    active = np.flatnonzero(np.diff(similarity.indptr))
    if not len(active):
        return factors
    matrix, num_vectors = similarity[active][:, active], dim + OVERSAMPLING
    basis = np.eye(len(active), dtype=np.float32)
    if len(active) > num_vectors:
        start = np.random.default_rng(0).standard_normal((len(active), num_vectors))
        basis = start.astype(np.float32)
        for _ in range(ITERATIONS):
            basis, _ = np.linalg.qr(matrix @ basis)
    eigenvalues, rotation = np.linalg.eigh(basis.T @ (matrix @ basis))
    leading = np.argsort(-eigenvalues)[:dim]
    vectors = basis @ rotation[:, leading]
    factors[active, : len(leading)] = vectors * np.sqrt(eigenvalues[leading].clip(0))
    return factors
