"""Split protocols of MovieLens on the bundled sample: no leak, equal items, splits with rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.data.movielens.prepare import SplitProtocol, prepare_movielens
from tests.recsys.data.movielens.movielens_sources import (
    Rating,
    read_split,
    tied_ratings,
    write_source,
)

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
    words = ["prepare", "movielens", "--source", str(tied_source), "--out", str(tmp_path / "out")]
    assert main([*words, "--split", "rolling", "--history_length", "3"]) == 0
    assert "window-1/train" in capsys.readouterr().out
    for window in WINDOWS:
        histories = [row["history"] for row in read_split(tmp_path / "out" / window, "test")]
        assert max(map(len, histories)) == 3


@pytest.mark.parametrize(
    ("split", "times", "words"),
    [
        ("global", [5] * 9, ["split: valid", "timestamp"]),
        ("rolling", [5] * 9, ["split: valid of window-1", "timestamp"]),
        # Enough moments for the global split, but the first half is one.
        ("rolling", [5] * 10 + list(range(6, 16)), ["split: valid of window-1", "timestamp"]),
        ("user", range(6), ["split: valid", "user", "7", "timestamp"]),
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
