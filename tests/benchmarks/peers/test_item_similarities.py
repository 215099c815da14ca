"""Features by co-rating: a training row reads nothing of its own fold, or of later blocks."""

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

    is_own_fold = users % item_similarities.FOLDS == 0
    other_history = np.where(np.repeat(is_own_fold, length), (history + 1) % num_items, history)
    moved = replace(train, history=other_history)
    old, new = features(train, train), features(moved, moved)
    np.testing.assert_allclose(old[is_own_fold, :2], new[is_own_fold, :2])  # of the target alone
    assert not np.array_equal(old[~is_own_fold], new[~is_own_fold])


def test_labels_of_the_same_fold_change_no_statistic_of_an_item_in_training_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import item_similarities
    import peer_rows

    users, items = np.arange(10), np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    labels = np.array([1.0, 0, 1, 0, 0, 1, 0, 1, 0, 0])
    none = np.zeros(0, np.int64)
    train = peer_rows.Rows(users, items, labels, np.zeros(11, np.int64), none, {})
    statistics = item_similarities.item_statistics(train, train, prior=1.0)
    # Users 0 and 5 are one fold: five rows of item 0 are left, one of them positive.
    expected = np.log1p(5), (1 + labels.mean()) / (5 + 1)
    np.testing.assert_allclose(statistics[[0, 5]], [expected, expected])
    later = replace(train)  # rows of another split count all training rows
    expected = np.log1p(7), (3 + labels.mean()) / (7 + 1)
    np.testing.assert_allclose(item_similarities.item_statistics(later, train, 1.0)[0], expected)


def test_by_time_a_training_row_reads_statistics_of_earlier_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import item_similarities
    import peer_rows

    generator, num_rows, length = np.random.default_rng(0), 20, 3
    lists = {n: generator.random(num_rows * length) for n in ("history_liked", "history_stars")}
    history = generator.integers(0, 6, num_rows * length)
    offsets, users = np.arange(num_rows + 1) * length, generator.integers(0, 4, num_rows)
    items, labels = generator.integers(0, 6, num_rows), np.arange(num_rows) % 2.0
    train = peer_rows.Rows(users, items, labels, offsets, history, lists)
    is_late = np.arange(num_rows) >= 12  # the last two of five blocks
    other = np.where(np.repeat(is_late, length), (history + 1) % 6, history)
    moved = replace(train, history=other, label=np.where(is_late, 1 - labels, labels))

    def features(rows: object) -> np.ndarray:
        padded = item_similarities.PaddedHistory.of_rows(rows, length)
        by_users = item_similarities.co_rating_features(rows, padded, rows, 6, by_time=True)
        mean = item_similarities.item_statistics(rows, rows, prior=1.0, by_time=True)
        return np.hstack([by_users[:, :1], mean])  # counts of ratings and rows, mean label

    old, new = features(train), features(moved)
    np.testing.assert_allclose(old[:12], new[:12])
    assert all((old[16:] != new[16:]).any(0)[[0, 2]])
    np.testing.assert_allclose(old[:4], [[0, 0, 0.5]] * 4)  # nothing is before the first block


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


@pytest.mark.parametrize("has_values", [False, True])
def test_item_cf_sums_similarities_to_the_last_items_of_the_history(
    monkeypatch: pytest.MonkeyPatch, has_values: bool
) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import item_cf_rows
    import item_similarities
    import peer_rows

    stars = np.array([0.2, 0.4, 0.9]) if has_values else np.ones(3)
    lists = dict.fromkeys(("history_liked", "history_stars"), stars)
    items, offsets = np.array([3]), np.array([0, 3])
    rows = peer_rows.Rows(np.array([9]), items, np.ones(1), offsets, np.arange(3), lists)
    similarity = np.zeros((4, 4))
    similarity[3, :3] = 0.5, 0.1, 0.2

    class Fixed(item_similarities.Events):
        def similarities(self, *_: object) -> list[np.ndarray]:  # by users, by values
            unused = np.full((4, 4), np.nan)
            return [unused, similarity] if has_values else [similarity, unused]

    score = item_cf_rows.item_cf(rows, Fixed(*([np.zeros(0)] * 4)), 4, 2, 1.0)

    deviations = [-0.25, 0.25] if has_values else [1, 1]  # of the last two, from their mean
    total = 0.3 if has_values else 1.0
    np.testing.assert_allclose(score, [(0.1 * deviations[0] + 0.2 * deviations[1]) / total])


def test_the_logistic_regression_has_a_loss_without_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    import item_cf_rows

    generator = np.random.default_rng(0)
    inputs, labels = generator.standard_normal((50, 3)), generator.integers(0, 2, 50)
    weights = item_cf_rows.logistic_regression(inputs, labels, 0.01)
    error = 1 / (1 + np.exp(-inputs @ weights[:-1] - weights[-1])) - labels
    np.testing.assert_allclose(inputs.T @ error / 50 + 0.01 * weights[:-1], 0, atol=1e-4)
    assert abs(error.mean()) < 1e-4
