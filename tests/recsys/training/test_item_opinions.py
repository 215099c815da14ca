"""Opinions on items are counted from the histories of the training rows."""

from __future__ import annotations

import pyarrow as pa
import torch

from recsys.data.schema import Column, Schema
from recsys.training.item_opinions import OpinionSums

SCHEMA = Schema(
    "item",
    "user",
    {
        "user": Column("id", num_embeddings=9),
        "item": Column("id", num_embeddings=3),
        "history": Column("sequence", shares="item", parallel=["stars"]),
        "liked": Column("label"),
    },
)


def test_an_opinion_is_the_mean_of_a_group_of_users_relative_to_their_own_means() -> None:
    """Users 1 and 3 are group 1; an item without a row in a group has the opinion 0."""
    rows = pa.table(
        {
            "user": [1, 3, 2, 2],
            "history": pa.array([[0], [0, 2], [1], []], pa.list_(pa.int64())),
            "stars": pa.array([[1.0], [0.0, 0.7], [0.4], []], pa.list_(pa.float32())),
        }
    )
    sums = OpinionSums(SCHEMA, "stars", num_groups=2, mean=0.4)
    sums.add(rows)
    # With 5 prior values of .4 the means are (1 + 2) / 6, (.7 + 2) / 7 and (.4 + 2) / 6 = .4.
    first, second = 3 / 6, 2.7 / 7
    expected = [[0.0, (1 - first + 0 - second) / 2], [0.0, 0.0], [0.0, 0.7 - second]]
    torch.testing.assert_close(sums.opinions(deviation=0.5), torch.tensor(expected) / 0.5)
