"""Training rows of the items of rows that are evaluated."""

from typing import Literal

import numpy as np
import pytest
import torch

from recsys.data.item_frequency import ItemCounts, target_counts
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column, VocabularySettings
from recsys.evaluation.evaluate import scores_report, split_scores

UNKNOWN = 4  # the last row of the table
TRAINED = ItemCounts.of_rows(np.array([0] * 6 + [UNKNOWN] * 7))


def schema_of(kind: Literal["exact", "hash"] | None) -> Schema:
    vocabulary = None if kind is None else VocabularySettings(kind)
    item = Column("id", num_embeddings=UNKNOWN + 1, vocabulary=vocabulary)
    return Schema("item", "item", {"item": item, "liked": Column("label")})


@pytest.mark.parametrize(("kind", "unknown"), [("exact", 0), ("hash", 7), (None, 7)])
def test_unknown_ids_of_an_exact_map_share_a_row_and_have_no_training_row(
    kind: Literal["exact", "hash"] | None, unknown: int
) -> None:
    counts = target_counts(TRAINED, np.array([UNKNOWN, 0, 1]), schema_of(kind))
    assert counts.tolist() == [unknown, 6, 0]


def test_rows_of_unknown_items_are_reported_as_unseen() -> None:
    scored = {
        "positions": torch.arange(4),
        "groups": torch.zeros(4, dtype=torch.int64),
        "items": torch.tensor([UNKNOWN, 0, UNKNOWN, 0]),
        "labels": torch.tensor([[1.0], [0.0], [0.0], [1.0]]),
        "logits": torch.tensor([[0.3], [-1.0], [0.1], [0.5]]),
    }
    report = scores_report(split_scores(schema_of("exact"), scored, TRAINED), {})
    rows = {subset: report[subset]["num_samples"] for subset in ("warm", "cold", "unseen")}
    assert rows == {"warm": 2, "cold": 2, "unseen": 2}
