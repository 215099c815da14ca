"""Counts of keys: exact while few, and near the truth in bounded memory when many."""

import numpy as np
import pytest

from embeddings.vocabulary.fixed import mix64
from recsys.diagnostics.dataset.key_counts import KeyCounts, hash_lists, hash_numbers, join_hashes
from recsys.diagnostics.dataset.numbers import Lengths


def counts_of(*parts: np.ndarray, limit: int = 1 << 20) -> KeyCounts:
    counts = KeyCounts(limit)
    for part in parts:
        counts.add(mix64(part))
    return counts


def test_few_keys_are_counted_exactly() -> None:
    counts = counts_of(np.array([3, 4, 3]), np.array([4, 5]))

    assert (counts.distinct, counts.repeats, counts.is_exact) == (3, 2, True)


def test_many_keys_are_counted_in_a_sample_of_bounded_size() -> None:
    ids = np.random.default_rng(0).integers(0, 300_000, 1_000_000)
    counts = counts_of(*np.array_split(ids, 7), limit=20_000)

    assert len(counts.keys) <= 20_000 and not counts.is_exact
    assert counts.distinct == pytest.approx(len(np.unique(ids)), rel=0.03)
    assert counts.repeats == pytest.approx(len(ids) - len(np.unique(ids)), rel=0.03)


def test_overlaps_are_read_off_samples_of_different_sizes() -> None:
    train, test = np.arange(100_000), np.repeat(np.arange(80_000, 120_000), 2)
    small, large = counts_of(test, limit=5000), counts_of(train, limit=50_000)

    assert small.share_of_total_in(large) == pytest.approx(0.5, abs=0.03)
    assert counts_of(np.array([1, 1, 2])).share_of_total_in(counts_of(np.array([1]))) == 2 / 3
    assert KeyCounts().share_of_total_in(large) is None


def test_hashes_of_lists_tell_order_length_and_place() -> None:
    values = np.array([1, 2, 2, 1, 1, 2, 0])
    first, second, third, empty, zero = hash_lists(values, np.array([0, 2, 4, 6, 6, 7]))

    assert first == third
    assert len({first, second, empty, zero}) == 4


def test_hashes_of_rows_are_those_of_all_their_parts_in_order() -> None:
    left, right = np.array([1, 2]), np.array([2, 1])
    rows = join_hashes(hash_numbers(left), hash_numbers(right))

    assert rows[0] != rows[1]
    assert hash_numbers(np.array([0.5, 0.25])).tolist() != hash_numbers(np.array([0, 0])).tolist()


def test_quantiles_of_lengths_are_exact() -> None:
    lengths = Lengths()
    values = np.random.default_rng(1).integers(0, 30, 1000)
    for part in np.array_split(values, 3):
        lengths.add(part)

    found = lengths.summary()
    assert found["max"] == values.max() and found["mean"] == pytest.approx(values.mean())
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        assert found[name] == np.quantile(values, share, method="inverted_cdf")
