"""The MovieLens adapter: its protocol against brute force, its files, its errors."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.movielens.prepare import SplitProtocol, prepare_movielens
from tests.datasets import png
from tests.recsys.data.movielens.movielens_sources import (
    Rating,
    read_split,
    tied_ratings,
    write_source,
)

POSTER = png(np.random.default_rng(0))
MOVIES = [
    (1, "Heat (1995)", "Action|Crime"),
    (5, "Solo, a film", "(no genres listed)"),
    (9, "X", ""),
]
RATINGS: list[Rating] = [(7, 1, 4.0, time) for time in range(8)] + [(3, 5, 2.5, 8), (3, 9, 5.0, 9)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", RATINGS, MOVIES)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("sample") / "dataset"
    return out, prepare_movielens(None, out)


def brute_force_history(
    ratings: Sequence[Rating], user: int, timestamp: int, length: int
) -> dict[str, list[Any]]:
    """The last ratings of the user before that moment, one by one."""
    past = sorted(
        (t, movie, stars) for u, movie, stars, t in ratings if u == user and t < timestamp
    )
    past = past[-length:]
    return {
        "history": [movie for _, movie, _ in past],
        "history_liked": [float(stars >= 4) for *_, stars in past],
        "history_stars": [pytest.approx(stars / 5) for *_, stars in past],
        "history_days": [
            pytest.approx(math.log10(1 + (timestamp - t) / 86_400) / 2, abs=1e-6) for t, *_ in past
        ],
    }


@pytest.mark.parametrize(
    ("length", "protocol"), [(1, "global"), (3, "global"), (20, "global"), (3, "user")]
)
def test_every_row_and_history_equals_brute_force_when_most_timestamps_are_ties(
    tmp_path: Path, length: int, protocol: SplitProtocol
) -> None:
    ratings, movies = tied_ratings(seed=length)
    out = tmp_path / "out"
    prepare_movielens(write_source(tmp_path / "source", ratings, movies), out, length, protocol)
    users = sorted({user for user, *_ in ratings})
    cuts = {}
    for user in users:
        times = [row[3] for row in ratings if protocol == "global" or row[0] == user]
        first, second = np.quantile(times, [0.8, 0.9], method="lower")
        cuts[user] = {"train": (-1, first), "valid": (first, second), "test": (second, 10**9)}
    for split in ("train", "valid", "test"):
        expected = []
        for user, movie, rating, timestamp in ratings:
            after, until = cuts[user][split]
            if after < timestamp <= until:
                past = brute_force_history(ratings, user, timestamp, length)
                expected.append(
                    {
                        "user": users.index(user),
                        "item": (movie - 2) // 7,
                        **past,
                        "history": [(past_movie - 2) // 7 for past_movie in past["history"]],
                        "liked": float(rating >= 4),
                        "timestamp": timestamp,
                    }
                )
        expected.sort(key=lambda row: (row["timestamp"], row["user"], row["item"]))
        assert read_split(out, split) == expected


def test_the_sample_has_the_figures_of_the_protocol(
    sample: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    out, summary = sample
    assert [summary[name]["rows"] for name in ("train", "valid", "test")] == [80669, 10083, 10084]
    liked = [round(100 * summary[name]["positive"], 2) for name in ("train", "valid", "test")]
    assert liked == [48.66, 51.54, 40.94]
    test = summary["test"]
    assert test["users"] == 74
    shares = [round(100 * test[name], 1) for name in ("new_users", "cold", "unseen")]
    assert shares == [90.8, 33.3, 20.1]
    assert pq.read_table(out / "train")["timestamp"].to_numpy().max() == 1458635171
    assert pq.read_table(out / "valid")["timestamp"].to_numpy().max() == 1498029445


def test_movies_in_any_order_become_items_in_order_of_id(tmp_path: Path) -> None:
    for name, movies in {"a": MOVIES, "b": MOVIES[::-1]}.items():
        source = write_source(tmp_path / name, RATINGS, movies)
        prepare_movielens(source, tmp_path / f"out_{name}")
    for part in ("items", "train", "test"):
        assert read_split(tmp_path / "out_a", part) == read_split(tmp_path / "out_b", part)


def test_plots_join_the_text_and_posters_keep_their_bytes_and_nulls(
    source: Path, tmp_path: Path
) -> None:
    contents = {
        "movieId": [9, 1, 77],  # 77 is not in movies.csv, and 5 is missing here
        "plot": ["Ants. ", None, "Not ours."],
        "poster": [None, POSTER, b"other"],
    }
    pq.write_table(pa.table(contents), source / "items.parquet")
    prepare_movielens(source, tmp_path / "out")
    items = pq.read_table(tmp_path / "out" / "items")
    assert items["text"].to_pylist() == ["Heat (1995) | Action, Crime", "Solo, a film", "X | Ants."]
    assert items["poster"].to_pylist() == [POSTER, None, None]
    assert items["poster"].type == pa.binary()
    schema = yaml.safe_load((tmp_path / "out" / "schema.yaml").read_text())
    assert schema["items"]["columns"]["poster"] == {"kind": "image"}


def replace_line(path: Path, number: int, line: str) -> None:
    """Line 1 is the header."""
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "number", "line", "words"),
    [
        ("ratings.csv", 3, "7,one,4.0,1", ["'movieId'", "row 3", "'one'"]),
        ("ratings.csv", 6, "7,2,4.0,1", ["'movieId'", "row 6", "movie 2", "movies.csv", "add it"]),
        ("ratings.csv", 6, "7,2,4.0", ["Row #6", "Expected 4 columns, got 3"]),
        ("ratings.csv", 4, "7,1,4.0,1600000000000", ["'timestamp'", "row 4", "milliseconds"]),
        ("ratings.csv", 5, "7,1,3.0,2", ["'userId'", "row 5", "user 7", "keep one"]),
        ("movies.csv", 3, "1,Twin,Drama", ["'movieId'", "row 3", "movie 1", "second time"]),
    ],
)
def test_bad_input_is_named_by_file_column_and_row(
    source: Path, tmp_path: Path, file: str, number: int, line: str, words: list[str]
) -> None:
    replace_line(source / file, number, line)
    with pytest.raises(ValueError) as caught:
        prepare_movielens(source, tmp_path / "out")
    for word in [str(source / file), *words]:
        assert word in str(caught.value)


def as_dat(source: Path, folder: Path) -> Path:
    """The same source in the form of MovieLens 1M: `::`, no header, Latin-1."""
    folder.mkdir()
    for name in ("ratings", "movies"):
        with open(source / f"{name}.csv", newline="") as file:
            rows = list(csv.reader(file))[1:]
        text = "".join("::".join(row) + "\n" for row in rows)
        (folder / f"{name}.dat").write_text(text, encoding="latin-1")
    return folder


def test_the_files_of_movielens_1m_and_10m_give_the_dataset_of_the_same_ratings(
    tmp_path: Path,
) -> None:
    movies = [(1, "Misérables: Les (1995)", "Drama"), *MOVIES[1:]]
    source = write_source(tmp_path / "source", RATINGS, movies)
    prepare_movielens(source, tmp_path / "csv")
    prepare_movielens(as_dat(source, tmp_path / "1m"), tmp_path / "dat")
    for part in ("train", "valid", "test", "items"):
        assert read_split(tmp_path / "dat", part) == read_split(tmp_path / "csv", part)


@pytest.mark.parametrize("file", ["ratings.csv", "movies.csv"])
def test_a_missing_or_an_empty_file_is_named(source: Path, tmp_path: Path, file: str) -> None:
    header = (source / file).read_text().splitlines()[0]
    for content, words in ((None, "such file"), ("", "Empty"), (header + "\n", "no rows")):
        (source / file).unlink(missing_ok=True)
        if content is not None:
            (source / file).write_text(content)
        with pytest.raises(ValueError, match=words) as caught:
            prepare_movielens(source, tmp_path / "out")
        assert str(source / file) in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"plot": ["a"]}, ["'movieId'", "exist"]),
        ({"movieId": [1]}, ["neither", "'plot'"]),
        ({"movieId": [1, 1], "plot": ["a", "b"]}, ["'movieId'", "row 1", "second time"]),
        ({"movieId": [1], "poster": [b"posters/1.jpg"]}, ["'poster'", "posters/1.jpg"]),
    ],
)
def test_bad_plots_and_posters_are_named_by_column_and_row(
    source: Path, tmp_path: Path, contents: dict[str, list[Any]], words: list[str]
) -> None:
    pq.write_table(pa.table(contents), source / "items.parquet")
    with pytest.raises(ValueError) as caught:
        prepare_movielens(source, tmp_path / "out")
    for word in [str(source / "items.parquet"), *words]:
        assert word in str(caught.value)
