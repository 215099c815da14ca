"""Features by co-rating: a training row reads nothing of its own fold of users."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.peers.trainings import ADAPTERS


def test_ratings_of_the_own_fold_change_no_feature_of_training_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import item_similarities
    import peer_rows

    generator = np.random.default_rng(0)
    users, length, num_items = np.arange(20), 6, 12
    history = np.concatenate([generator.permutation(num_items)[:length] for _ in users])
    lists = {name: generator.random(len(history)) for name in ("history_liked", "history_stars")}
    offsets = np.arange(len(users) + 1) * length
    items = generator.integers(0, num_items, len(users))
    train = peer_rows.Rows(users, items, np.zeros(len(users)), offsets, history, lists)

    def features(rows: object, other: object) -> np.ndarray:
        padded = item_similarities.PaddedHistory.of_rows(rows, length)
        return item_similarities.co_rating_features(rows, padded, other, num_items)

    own = users % item_similarities.FOLDS == 0
    other_history = np.where(np.repeat(own, length), (history + 1) % num_items, history)
    moved = replace(train, history=other_history)
    before, after = features(train, train), features(moved, moved)
    np.testing.assert_allclose(before[own, :2], after[own, :2])  # of the target alone
    assert not np.array_equal(before[~own], after[~own])


def test_in_a_log_without_values_the_nearest_items_count_by_their_similarity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import item_similarities
    import peer_rows

    ones = {name: np.ones(6) for name in ("history_liked", "history_stars")}
    one = np.array([0])
    rows = peer_rows.Rows(one, one, one, np.array([0, 6]), np.arange(6), ones)
    history = item_similarities.PaddedHistory.of_rows(rows, 7)  # a place before is padded
    similarity = np.array([[0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])
    features = item_similarities.similarity_features(similarity, history)[0].tolist()
    mean, highest, *_, latest, last, nearest, nearest_five, nearest_twenty, _, total = features
    assert np.allclose([mean, highest, latest, last, nearest], [0.25, 0.5, 0.2, 0.4, 0.5])
    assert np.allclose([nearest_five, nearest_twenty, total], [0.3, 1.5 / 20, 1.5 / 7**0.5])
