"""Item vectors outside of training: each item is encoded once, to the vectors of the slow way."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.content.item_vectors import ItemVectorCache, items_per_fill
from recsys.data.items.kind import ContentInput
from tests.recsys.content.tiny_branch import BANK_DIM, NUM_ITEMS, batch_of, branch_of, content_of

RAW = 100  # item k has raw id 100 + k, and row NUM_ITEMS - 1 - k of the files
UNKNOWN = 7  # ids below 100 have no row; item 0 has no content either


class Store:
    """Content of the tiny branch's items by raw id; notes what is asked for."""

    def __init__(self) -> None:
        self.items = SimpleNamespace(num_rows=NUM_ITEMS)
        self.gathered: list[int] = []

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        return np.where(ids < RAW, -1, NUM_ITEMS - 1 - (ids - RAW))

    def gather(self, ids: np.ndarray) -> dict[str, ContentInput]:
        self.gathered += ids.tolist()
        return content_of(torch.from_numpy(np.where(ids < RAW, 0, ids - RAW)))


def expected(ids: list[int]) -> Tensor:
    return branch_of("bank_lora").eval().encode(Store().gather(np.array(ids, np.int64)))


@pytest.mark.parametrize(
    ("capacity", "requested"),
    [
        (NUM_ITEMS, [103, 105, 7, 107, 104]),
        (2, [103, 105, 7, 107, 7, 7, 107, 104]),  # the others are encoded in each batch
    ],
)
def test_each_item_is_encoded_once_as_far_as_vectors_fit(
    capacity: int, requested: list[int]
) -> None:
    store: Any = Store()
    branch = branch_of("bank_lora").eval()
    cache = ItemVectorCache(branch, store, torch.device("cpu"), capacity * BANK_DIM * 4)
    for ids in ([103, 105, UNKNOWN], [105, 107, UNKNOWN], [103], [UNKNOWN, 103, 107, 104]):
        vectors = cache.vectors(torch.tensor(ids, dtype=torch.int64))
        torch.testing.assert_close(vectors, expected(ids))
    assert cache.vectors(torch.zeros(0, dtype=torch.int64)).shape == (0, BANK_DIM)
    assert store.gathered == requested


def test_the_branch_takes_the_vectors_that_a_batch_has() -> None:
    branch, batch = branch_of("full").eval(), batch_of("full")
    store: Any = Store()
    store.gather = lambda ids: content_of(torch.from_numpy(ids))
    store.rows_of = lambda ids: ids
    slow = branch(batch)
    (with_vectors,) = ItemVectorCache(branch, store, torch.device("cpu"))(iter([batch]))
    assert not with_vectors.content.inputs
    branch.encode = None  # type: ignore[method-assign, assignment]
    fast = branch(with_vectors)
    torch.testing.assert_close(fast.target, slow.target)
    torch.testing.assert_close(fast.read_history(), slow.read_history())


def test_calls_that_fill_the_bank_of_a_gpu_have_as_many_items_as_those_that_score() -> None:
    assert items_per_fill(torch.device("cpu")) == 256
    assert items_per_fill(torch.device("cuda")) == 1024
