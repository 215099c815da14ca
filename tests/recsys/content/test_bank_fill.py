"""Vectors of items, read from the bank or encoded where there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recsys.content import bank_fill
from recsys.content.bank_fill import item_vectors
from recsys.distributed.ranks import joined_ranks
from tests.recsys.content.tiny_branch import KEPT_DIM, branch_of, content_of


@pytest.mark.parametrize("items", [[], [3], [0, 1, 2, 3, 4]])
def test_without_a_bank_vectors_are_those_of_the_encoders(
    items: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = branch_of("full")
    store: Any = SimpleNamespace(gather=lambda ids: content_of(torch.from_numpy(ids)))
    monkeypatch.setattr(bank_fill, "ITEMS_PER_CALL", 2)
    ids = np.array(items, np.int64)
    with joined_ranks("cpu") as ranks:
        vectors = item_vectors(branch, store, ranks, ids)
    assert vectors.shape == (len(items), KEPT_DIM)
    if items:
        with torch.no_grad():
            expected = branch.eval().encode(content_of(torch.from_numpy(ids)))
        torch.testing.assert_close(vectors, expected)
