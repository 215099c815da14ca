"""MovieLens: its files, and the splits that are made of them."""

import csv
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.cli import main
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
    rows = sorted(
        (t, movie, stars) for u, movie, stars, t in ratings if u == user and t < timestamp
    )
    rows = rows[-length:]
    return {
        "history": [movie for _, movie, _ in rows],
        "history_liked": [float(stars >= 4) for *_, stars in rows],
        "history_stars": [pytest.approx(stars / 5) for *_, stars in rows],
        "history_days": [
            pytest.approx(math.log10(1 + (timestamp - t) / 86_400) / 2, abs=1e-6) for t, *_ in rows
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
            start, end = cuts[user][split]
            if start < timestamp <= end:
                history = brute_force_history(ratings, user, timestamp, length)
                expected.append(
                    {
                        "user": users.index(user),
                        "item": (movie - 2) // 7,
                        **history,
                        "history": [(liked_movie - 2) // 7 for liked_movie in history["history"]],
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
    for split in ("items", "train", "test"):
        assert read_split(tmp_path / "out_a", split) == read_split(tmp_path / "out_b", split)


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
    ("file", "number", "line", "texts"),
    [
        ("ratings.csv", 3, "7,one,4.0,1", ["'movieId'", "Row #3", "'one'"]),
        ("ratings.csv", 6, "7,2,4.0,1", ["'movieId'", "row 6", "movie 2", "movies.csv", "add it"]),
        ("ratings.csv", 6, "7,2,4.0", ["Row #6", "Expected 4 columns, got 3"]),
        ("ratings.csv", 4, "7,1,4.0,1600000000000", ["'timestamp'", "row 4", "milliseconds"]),
        ("ratings.csv", 5, "7,1,3.0,2", ["'userId'", "row 5", "user 7", "keep one"]),
        ("ratings.csv", 4, "9007199254740993,1,4.0,1", ["'userId'", "row 4", "or more"]),
        ("movies.csv", 3, "1,Twin,Drama", ["'movieId'", "row 3", "movie 1", "second time"]),
    ],
)
def test_bad_input_is_named_by_file_column_and_row(
    source: Path, tmp_path: Path, file: str, number: int, line: str, texts: list[str]
) -> None:
    replace_line(source / file, number, line)
    with pytest.raises(ValueError) as caught:
        prepare_movielens(source, tmp_path / "out")
    for text in [str(source / file), *texts]:
        assert text in str(caught.value)


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
    for split in ("train", "valid", "test", "items"):
        assert read_split(tmp_path / "dat", split) == read_split(tmp_path / "csv", split)


@pytest.mark.parametrize("file", ["ratings.csv", "movies.csv"])
def test_a_missing_or_an_empty_file_is_named(source: Path, tmp_path: Path, file: str) -> None:
    header = (source / file).read_text().splitlines()[0]
    for content, message in ((None, "such file"), ("", "empty"), (header + "\n", "no rows")):
        (source / file).unlink(missing_ok=True)
        if content is not None:
            (source / file).write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            prepare_movielens(source, tmp_path / "out")
        assert str(source / file) in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "texts"),
    [
        ({"plot": ["a"]}, ["movieId", "exist"]),
        ({"movieId": [1]}, ["neither", "'plot'"]),
        ({"movieId": [1, 1], "plot": ["a", "b"]}, ["'movieId'", "row 1", "second time"]),
        ({"movieId": [1], "poster": [b"posters/1.jpg"]}, ["'poster'", "posters/1.jpg"]),
    ],
)
def test_bad_plots_and_posters_are_named_by_column_and_row(
    source: Path, tmp_path: Path, contents: dict[str, list[Any]], texts: list[str]
) -> None:
    pq.write_table(pa.table(contents), source / "items.parquet")
    with pytest.raises(ValueError) as caught:
        prepare_movielens(source, tmp_path / "out")
    for text in [str(source / "items.parquet"), *texts]:
        assert text in str(caught.value)


SPLITS = ("train", "valid", "test")
WINDOWS = tuple(f"window-{number}" for number in range(1, 6))
Prepared = tuple[Path, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def rolling(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("rolling") / "datasets"
    return out, prepare_movielens(None, out, split="rolling")


@pytest.fixture(scope="module")
def by_user(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("user") / "dataset"
    return out, prepare_movielens(None, out, split="user")


@pytest.fixture
def tied_source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", *tied_ratings(seed=0))


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def digest(files: list[Path]) -> str:
    """Return a digest of the values in all columns of some files."""
    values = hashlib.sha256()
    for file in sorted(files):
        table = pq.read_table(file)
        for name in sorted(table.column_names):
            values.update(f"{name} {table[name].type}".encode())
            column = table[name]
            if pa.types.is_list(column.type):
                values.update(pc.list_value_length(column).to_numpy().tobytes())
                column = pc.list_flatten(column)
            is_text = pa.types.is_string(column.type)
            values.update(str(column.to_pylist()).encode() if is_text else column.to_numpy())
    return values.hexdigest()


# Of what the adapter of version 0.1, with code of its own for splits and histories, wrote.
DIGESTS = {
    "rolling": "d3e3c5a1963b6dda294b6787589bacdda27387e26ce59c24c7917cc2245b610d",
    "user": "006c883ad5e8a6a4eda8c19d78b6b7f7ae38bed7345e89ae0030692d9c20e7c0",
}


@pytest.mark.parametrize("split", DIGESTS)
def test_datasets_of_the_sample_never_change(
    rolling: Prepared, by_user: Prepared, split: str
) -> None:
    out = {"rolling": rolling, "user": by_user}[split][0]
    files = [file for name in (*SPLITS, "items") for file in out.rglob(f"{name}/*.parquet")]
    assert digest(files) == DIGESTS[split]


def test_no_train_row_of_a_window_is_as_late_as_a_row_it_is_judged_by(rolling: Prepared) -> None:
    for window in WINDOWS:
        train, valid, test = (
            column(pq.read_table(rolling[0] / window / name), "timestamp") for name in SPLITS
        )
        assert train.max() < valid.min()
        assert valid.max() < test.min()


def test_the_command_takes_protocol_and_history_length(
    tied_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["prepare", "movielens", "--source", str(tied_source), "--out", str(tmp_path / "out")]
    assert main([*argv, "--split", "rolling", "--history_length", "3"]) == 0
    assert "window-1/train" in capsys.readouterr().out
    for window in WINDOWS:
        histories = [row["history"] for row in read_split(tmp_path / "out" / window, "test")]
        assert max(map(len, histories)) == 3


@pytest.mark.parametrize(
    ("split", "times", "texts"),
    [
        ("global", [5] * 9, ["split: valid", "timestamp"]),
        ("rolling", [5] * 9, ["split: valid of window-1", "timestamp"]),
        # Enough moments for the global split, but the first half is one.
        ("rolling", [5] * 10 + list(range(6, 16)), ["split: valid of window-1", "timestamp"]),
        ("user", range(6), ["split: valid", "user", "7", "timestamp"]),
    ],
)
def test_a_split_without_rows_is_refused_with_the_fix(
    tmp_path: Path, split: SplitProtocol, times: list[int], texts: list[str]
) -> None:
    ratings: list[Rating] = [(1, movie, 4.0, time) for movie, time in enumerate(times)]
    movies = [(movie, "Heat (1995)", "Drama") for movie in range(len(ratings))]
    source = write_source(tmp_path / "source", ratings, movies)
    with pytest.raises(ValueError) as caught:
        prepare_movielens(source, tmp_path / "out", split=split)
    for text in texts:
        assert text in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
