"""Split protocols of MovieLens: each rule against literal code, and the errors of empty splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys.data.movielens.prepare import prepare_movielens
from recsys.data.movielens.protocols import (
    SplitProtocol,
    history_ranges,
    split_by_time,
    split_each_user,
    split_rolling,
)
from tests.recsys.data.movielens.movielens_sources import Rating, tied_ratings, write_source


def test_a_history_holds_nothing_of_its_own_moment() -> None:
    user = np.array([0, 0, 0, 0, 1, 1])
    timestamp = np.array([5, 5, 6, 6, 6, 7])
    begin, end = history_ranges(user, timestamp, length=20)
    assert begin.tolist() == [0, 0, 0, 0, 4, 4]
    assert end.tolist() == [0, 0, 2, 2, 4, 5]


def test_a_history_keeps_the_latest_ratings() -> None:
    begin, end = history_ranges(np.zeros(4, int), np.array([1, 2, 3, 4]), length=2)
    assert begin.tolist() == [0, 0, 0, 1]
    assert end.tolist() == [0, 1, 2, 3]


def test_a_history_may_be_longer_than_any_integer() -> None:
    begin, _ = history_ranges(np.zeros(4, int), np.array([1, 2, 3, 4]), length=10**30)
    assert begin.tolist() == [0] * 4


def test_the_split_never_cuts_a_moment_in_two() -> None:
    # Places 0.8 * 19 and 0.9 * 19, rounded down, are 15 and 17: the moments 1 and 3.
    timestamp = np.array([3, 4, 2, 3] + [1] * 16)
    splits = split_by_time(timestamp)
    assert splits["train"].tolist() == list(range(4, 20))
    assert splits["valid"].tolist() == [0, 2, 3]
    assert splits["test"].tolist() == [1]


def test_each_user_is_split_by_the_quantiles_of_the_users_own_times() -> None:
    rows, _ = tied_ratings(seed=3)
    pairs = sorted((user, time) for user, _, _, time in rows)
    user = np.unique([user for user, _ in pairs], return_inverse=True)[1]
    time = np.array([time for _, time in pairs])
    expected: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for row in range(len(user)):
        first, second = np.quantile(time[user == user[row]], [0.8, 0.9], method="lower")
        name = "train" if time[row] <= first else "valid" if time[row] <= second else "test"
        expected[name].append(row)
    splits = split_each_user(user, time)
    assert {name: rows.tolist() for name, rows in splits.items()} == expected


def test_ratings_of_one_moment_go_where_the_first_of_them_goes() -> None:
    # User 0, 11 ratings: places up to 8 are train, place 9 is valid, place 10 test.
    # User 1: the moment at places 8, 9 and 10 is train whole. User 2: those at 9 and 10 are valid.
    times = {
        0: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        1: [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8],
        2: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9],
    }
    splits = split_each_user(np.repeat([0, 1, 2], 11), np.concatenate(list(times.values())))
    assert splits["valid"].tolist() == [9, 22 + 9, 22 + 10]
    assert splits["test"].tolist() == [10]
    assert len(splits["train"]) == 9 + 11 + 9


def test_a_user_with_one_moment_has_train_rows_alone() -> None:
    user = np.array([0, 0, *[1] * 10])
    splits = split_each_user(user, np.array([5, 5, *range(10)]))
    assert {0, 1} <= set(splits["train"].tolist())


def test_windows_of_a_hundred_moments_are_tenths_of_them() -> None:
    # The quantile k / 10 of 0 ... 100 is 10 k.
    windows = split_rolling(np.arange(101)[::-1])
    assert list(windows) == [f"window-{number}" for number in range(1, 6)]
    for number, splits in enumerate(windows.values(), start=1):
        times = {name: sorted(100 - rows) for name, rows in splits.items()}
        test_begin = 40 + 10 * number
        assert times["train"] == list(range(test_begin - 9))
        assert times["valid"] == list(range(test_begin - 9, test_begin + 1))
        assert times["test"] == list(range(test_begin + 1, test_begin + 11))


MOVIE = [(1, "Heat (1995)", "Drama")]


@pytest.mark.parametrize(
    ("split", "times", "words"),
    [
        ("global", [5] * 9, ["leave no row for valid;", "give ratings at more distinct times"]),
        ("rolling", [5] * 9, ["leave no row for valid of window-1;", "at more distinct times"]),
        # Enough moments for the global split, but the first half is one.
        ("rolling", [5] * 10 + list(range(6, 16)), ["leave no row for valid of window-1;"]),
        ("user", range(6), ["each user's", "leave no row for valid;", "7 ratings or more"]),
        ("user", [5] * 9, ["each user's", "leave no row for valid;", "use the global split"]),
    ],
)
def test_a_split_without_rows_is_refused_with_the_fix(
    tmp_path: Path, split: SplitProtocol, times: list[int], words: list[str]
) -> None:
    ratings: list[Rating] = [(1, 1, 4.0, time) for time in times]
    source = write_source(tmp_path / "source", ratings, MOVIE)
    with pytest.raises(ValueError) as caught:
        prepare_movielens(source, tmp_path / "out", split=split)
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_seven_ratings_of_a_user_are_enough_for_all_splits() -> None:
    splits = split_each_user(np.zeros(7, int), np.arange(7))
    assert [len(rows) for rows in splits.values()] == [5, 1, 1]


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split is 'random'; choose one of global, user, rolling"):
        prepare_movielens(None, tmp_path / "out", split="random")  # type: ignore[arg-type]
