"""Split protocols of MovieLens: each rule against literal code, and the errors of empty splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys.data.movielens.prepare import SplitProtocol, prepare_movielens
from tests.recsys.data.movielens.movielens_sources import Rating, tied_ratings, write_source

Places = dict[str, list[int]]  # places of the ratings, by split


def splits_of(
    folder: Path, users: list[int], times: list[int], split: SplitProtocol, dataset: str = ""
) -> Places:
    """Prepare ratings of one movie each, so that an item's row is the place of its rating."""
    ratings: list[Rating] = [
        (user, place, 4.0, time)
        for place, (user, time) in enumerate(zip(users, times, strict=True))
    ]
    if not (folder / "out").exists():
        movies = [(place, "movie", "Drama") for place in range(len(ratings))]
        source = write_source(folder / "source", ratings, movies)
        prepare_movielens(source, folder / "out", 10**30, split)
    tables = {
        name: pq.read_table(folder / "out" / dataset / name) for name in ("train", "valid", "test")
    }
    return {name: sorted(table["item"].to_pylist()) for name, table in tables.items()}


def test_the_split_never_cuts_a_moment_in_two(tmp_path: Path) -> None:
    # Places 0.8 * 19 and 0.9 * 19, rounded down, are 15 and 17: the moments 1 and 3.
    times = [3, 4, 2, 3] + [1] * 16
    splits = splits_of(tmp_path, [1] * 20, times, "global")
    assert splits == {"train": list(range(4, 20)), "valid": [0, 2, 3], "test": [1]}


def test_each_user_is_split_by_the_quantiles_of_the_users_own_times(tmp_path: Path) -> None:
    rows, _ = tied_ratings(seed=3)
    user, time = np.array([row[0] for row in rows]), np.array([row[3] for row in rows])
    expected: Places = {"train": [], "valid": [], "test": []}
    for row in range(len(user)):
        first, second = np.quantile(time[user == user[row]], [0.8, 0.9], method="lower")
        name = "train" if time[row] <= first else "valid" if time[row] <= second else "test"
        expected[name].append(row)
    assert splits_of(tmp_path, user.tolist(), time.tolist(), "user") == expected


def test_ratings_of_one_moment_go_where_the_first_of_them_goes(tmp_path: Path) -> None:
    # User 0, 11 ratings: places up to 8 are train, place 9 is valid, place 10 test.
    # User 1: the moment at places 8, 9 and 10 is train whole. User 2: those at 9 and 10 are valid.
    times = [
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8),
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9),
    ]
    splits = splits_of(tmp_path, [user for user in range(3) for _ in range(11)], times, "user")
    assert splits["valid"] == [9, 22 + 9, 22 + 10]
    assert splits["test"] == [10]
    assert len(splits["train"]) == 9 + 11 + 9


def test_a_user_with_one_moment_has_train_rows_alone(tmp_path: Path) -> None:
    splits = splits_of(tmp_path, [0, 0, *[1] * 10], [5, 5, *range(10)], "user")
    assert {0, 1} <= set(splits["train"])


def test_windows_of_a_hundred_moments_are_tenths_of_them(tmp_path: Path) -> None:
    # The quantile k / 10 of 0 ... 100 is 10 k.
    for number in range(1, 6):
        splits = splits_of(tmp_path, [1] * 101, list(range(101)), "rolling", f"window-{number}")
        begin = 40 + 10 * number
        assert splits["train"] == list(range(begin - 9))
        assert splits["valid"] == list(range(begin - 9, begin + 1))
        assert splits["test"] == list(range(begin + 1, begin + 11))


def test_seven_ratings_of_a_user_are_enough_for_all_splits(tmp_path: Path) -> None:
    splits = splits_of(tmp_path, [1] * 7, list(range(7)), "user")
    assert [len(rows) for rows in splits.values()] == [5, 1, 1]


@pytest.mark.parametrize(
    ("split", "times", "words"),
    [
        ("global", [5] * 9, ["split: valid", "timestamp"]),
        ("rolling", [5] * 9, ["split: valid of window-1", "timestamp"]),
        # Enough moments for the global split, but the first half is one.
        ("rolling", [5] * 10 + list(range(6, 16)), ["split: valid of window-1", "timestamp"]),
        ("user", range(6), ["split: valid", "user", "7", "timestamp"]),
        ("user", [5] * 9, ["split: valid", "user", "7", "timestamp"]),
    ],
)
def test_a_split_without_rows_is_refused_with_the_fix(
    tmp_path: Path, split: SplitProtocol, times: list[int], words: list[str]
) -> None:
    ratings: list[Rating] = [(1, movie, 4.0, time) for movie, time in enumerate(times)]
    movies = [(movie, "Heat (1995)", "Drama") for movie in range(len(ratings))]
    source = write_source(tmp_path / "source", ratings, movies)
    with pytest.raises(ValueError) as caught:
        prepare_movielens(source, tmp_path / "out", split=split)
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split is 'random'.* rolling"):
        prepare_movielens(None, tmp_path / "out", split="random")  # type: ignore[arg-type]
