"""Counts the item vectors of collaborative filtering (`ranking.opinions`) from the training rows.

Shapes: R rows, N history items of the rows, I items, G groups of users.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from recsys.build import Job
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import RAW_GROUP
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks
from recsys.ranking.layers.collaborative_filtering import PRIOR_VALUES, CollaborativeFiltering

logger = logging.getLogger(__name__)


class OpinionSums:
    """Sums of the values of each item by group of users, row by row.

    A pair of user and item counts as often as rows have it in their history; the opinion is a mean.

    Args:
        schema: columns of the rows.
        column: the list beside the history whose values are opinions.
        num_groups: G.
        mean: mean of the values of all histories.
    """

    def __init__(self, schema: Schema, column: str, num_groups: int, mean: float) -> None:
        """Start without rows."""
        self.schema, self.column, self.mean = schema, column, mean
        self.shape = schema.num_items, num_groups
        self.sums = torch.zeros(schema.num_items * num_groups)
        self.counts = torch.zeros(schema.num_items * num_groups)

    def add(self, table: pa.Table) -> None:  # R rows
        """Include rows; padding rows have no history."""
        rows = RowColumns.of(table)
        assert self.schema.history is not None
        items, lengths = rows.values(self.schema.history), rows.lengths(self.schema.history)
        values = rows.values(self.column).astype(np.float64)
        users = rows.numbers[RAW_GROUP if RAW_GROUP in rows.numbers else self.schema.group]
        of_rows = np.repeat(np.arange(rows.num_rows), lengths)
        totals = np.bincount(of_rows, values, minlength=rows.num_rows) + PRIOR_VALUES * self.mean
        relative = values - (totals / (lengths + PRIOR_VALUES))[of_rows]
        groups = np.remainder(users, self.shape[1])[of_rows]
        places = torch.from_numpy(items * self.shape[1] + groups)
        self.sums.index_add_(0, places, torch.from_numpy(relative).float())
        self.counts.index_add_(0, places, torch.ones(len(places)))

    def add_up(self, ranks: Ranks) -> None:
        """Include the rows of all ranks. A collective."""
        for sums in (self.sums, self.counts):
            dist.all_reduce(sums, group=ranks.group)

    def opinions(self, deviation: float) -> torch.Tensor:  # [I, G]
        """Return the mean of each item and group in standard deviations, 0 without a row."""
        return (self.sums / self.counts.clamp(min=1) / deviation).view(self.shape)


def fill_opinions(job: Job) -> None:
    """Count opinions in the training rows, if the ranking model has votes by them. A collective.

    Opinions of a run that this one begins with stay where its own rows have none.

    Raises:
        ValueError: on every rank: the rows cannot be read.
    """
    votes = [
        module for module in job.em3.ranking.modules() if isinstance(module, CollaborativeFiltering)
    ]
    if not votes:
        return
    ranks, schema = job.ranks, job.schema
    _describe(votes[0], schema)
    column, num_groups = schema.parallel[votes[0].column], votes[0].opinions.shape[1]
    with ranks.raise_on_all_ranks():
        rows = job.rows("train")
        share = rows.share(ranks.rank, ranks.world_size)
        moments = np.zeros(3)
        for table in rows.read(*share):
            values = RowColumns.of(table).values(column).astype(np.float64)
            moments += len(values), values.sum(), np.square(values).sum()
    count, total, square = np.sum(ranks.gather(moments.tolist()), axis=0)
    mean = total / max(count, 1)
    deviation = max(square / max(count, 1) - mean**2, 0) ** 0.5 or 1.0
    sums = OpinionSums(schema, column, num_groups, mean)
    with ranks.raise_on_all_ranks():
        for table in rows.read(*share):
            sums.add(table)
    sums.add_up(ranks)
    opinions = sums.opinions(deviation).to(ranks.device)
    for module in votes:
        module.fill(opinions, mean, deviation)


def _describe(votes: CollaborativeFiltering, schema: Schema) -> None:
    """Log the number of groups, and what is lost if users share them."""
    (num_items, groups), users = votes.opinions.shape, schema.limit(schema.group)
    words = f"votes: opinions on {num_items:,} items by {groups:,} groups of users"
    if groups < users:
        words += (
            f", which the {users:,} rows of table '{schema.group}' share; the more share one, the "
            "less votes tell (ranking.opinion_groups, 2 bytes per item and group)"
        )
    logger.info(words)
