"""The vectors of content that further histories add, against those of the history alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from recsys.config import ranking_settings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import FurtherHistory
from recsys.data.jagged_history import JaggedHistory
from recsys.data.schema_columns import HistoryColumns
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.extra_sequences import ExtraSequences
from tests.recsys.ranking.ranking_inputs import CONTENT, CONTENT_DIM, ID_DIM, inputs

BOUGHT = [HistoryColumns("bought", ["bought_price"], [])]
LENGTHS, PLACES = torch.tensor([1, 2, 0]), torch.tensor([4, 0, 4])  # of the 5 history items


def further_of(encoder: Any) -> ExtraSequences:
    torch.manual_seed(0)
    content = replace(CONTENT, history=replace(CONTENT.history, columns=["bought"]))
    settings = ranking_settings("dlrm", further_histories=encoder)
    return ExtraSequences(settings, ID_DIM, BOUGHT, content)


@pytest.mark.parametrize("encoder", ["attention", "mean"])
def test_content_is_read_as_that_of_a_history_of_these_items_alone(encoder: str) -> None:
    ids, content, batch = inputs()
    prices = torch.rand(3, 1)
    batch.further.append(FurtherHistory(LENGTHS, prices, 2, PLACES))
    further = further_of(encoder)
    ids = replace(ids, further=[torch.randn(3, ID_DIM)])

    *pooled, of_ids, of_content = further(ids, content, batch).pooled

    assert [len(part[0]) for part in (of_ids, of_content)] == list(further.widths.values())
    assert len(pooled) == 2 and not of_ids[2].any() and not of_content[2].any()
    items, modalities = content.read_history()
    encode = further.content_encoders[0]
    if isinstance(encode, ContentInterest):
        alone = ContentVectors(
            content.target, items[PLACES], content.target_modalities, modalities[PLACES]
        )
        history = JaggedHistory.of(torch.arange(3), LENGTHS, 3)
        torch.testing.assert_close(of_content, encode(alone, history, prices))
        cosine = F.cosine_similarity(content.target[0], items[4], dim=0)
        torch.testing.assert_close(of_content[0, CONTENT_DIM], cosine)  # the mean of one item
    else:
        events = items[PLACES] + prices @ encode.parallel_map.weight.T  # type: ignore[union-attr]
        expected = torch.stack([events[0], events[1:].mean(dim=0)])
        torch.testing.assert_close(of_content[:2], expected)
