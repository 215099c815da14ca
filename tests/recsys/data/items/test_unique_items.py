"""The fast ways to unique items give what sorting all of them gives."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from recsys.data.items import unique_items
from recsys.data.items.unique_items import UniqueItems, hashed


def assert_like_numpy(found: tuple[np.ndarray, np.ndarray], items: np.ndarray) -> None:
    for one, other in zip(found, np.unique(items, return_inverse=True), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.int64
        assert one.flags.writeable


@pytest.mark.parametrize("most_marks", [0, 1 << 22])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("num_items", [1, 2, 50, 2000])
def test_unique_items_are_those_of_numpy(
    num_items: int, count: int, most_marks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unique_items, "MOST_MARKS", most_marks)
    rng = np.random.default_rng((num_items, count))
    unique = UniqueItems(num_items)
    for _ in range(3):  # nothing stays of a call before
        items = rng.integers(num_items, size=count)
        assert_like_numpy(unique(items), items)


def test_ids_of_any_size_are_hashed() -> None:
    items = np.array([2**62, 5, 2**62, 0, 2**40])
    assert_like_numpy(hashed(items), items)
    assert_like_numpy(UniqueItems(2**62 + 1)(items), items)


def test_threads_do_not_disturb_each_other() -> None:
    unique = UniqueItems(500)
    draws = [np.random.default_rng(seed).integers(500, size=5000) for seed in range(64)]
    with ThreadPoolExecutor(4) as pool:
        for found, items in zip(pool.map(unique, draws), draws, strict=True):
            assert_like_numpy(found, items)
