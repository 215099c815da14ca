"""Datasets of the MovieLens protocols on the bundled sample: no leak, equal items, all or none."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import recsys.data.events.output.dataset as dataset
from recsys.cli import main
from recsys.data.movielens.prepare import format_summary, prepare_movielens
from recsys.data.movielens.source import SAMPLE
from tests.recsys.data.movielens.movielens_sources import read_split, tied_ratings, write_source

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


def files_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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


def test_the_last_window_is_the_global_split_to_the_byte(rolling: Prepared, tmp_path: Path) -> None:
    summary = prepare_movielens(None, tmp_path / "global")
    files = files_in(tmp_path / "global")
    del files["report.json"]  # that of all windows is above them
    assert files_in(rolling[0] / "window-5") == files
    assert {name: rolling[1][f"window-5/{name}"] for name in SPLITS} == summary


def test_each_window_validates_on_the_test_rows_of_the_window_before(rolling: Prepared) -> None:
    out, _ = rolling
    for earlier, later in pairwise(WINDOWS):
        assert pq.read_table(out / earlier / "test").equals(pq.read_table(out / later / "valid"))
        assert not pq.read_table(out / later / "test").equals(pq.read_table(out / later / "valid"))


def test_rows_of_a_window_are_all_ratings_up_to_its_end_once(rolling: Prepared) -> None:
    ratings = pq.read_table(SAMPLE / "ratings.parquet")
    user = np.unique(column(ratings, "userId"), return_inverse=True)[1]
    movies = np.sort(column(pq.read_table(SAMPLE / "movies.parquet"), "movieId"))
    item, time = np.searchsorted(movies, column(ratings, "movieId")), column(ratings, "timestamp")
    for number, window in enumerate(WINDOWS, start=1):
        tables = [pq.read_table(rolling[0] / window / name) for name in SPLITS]
        rows = Counter(
            pair
            for table in tables
            for pair in zip(*(column(table, c).tolist() for c in ("user", "item")), strict=True)
        )
        until = time <= np.quantile(time, (5 + number) / 10, method="lower")
        assert rows == Counter(zip(user[until].tolist(), item[until].tolist(), strict=True))
    assert sum(rows.values()) == len(time)


def test_no_train_row_of_a_window_is_as_late_as_a_row_it_is_judged_by(rolling: Prepared) -> None:
    for window in WINDOWS:
        train, valid, test = (
            column(pq.read_table(rolling[0] / window / name), "timestamp") for name in SPLITS
        )
        assert train.max() < valid.min()
        assert valid.max() < test.min()


def test_no_train_row_of_a_user_is_as_late_as_a_row_the_user_is_judged_by(
    by_user: Prepared,
) -> None:
    tables = [pq.read_table(by_user[0] / name) for name in SPLITS]
    assert sum(table.num_rows for table in tables) == 100_836
    for user in range(610):
        times = [column(t, "timestamp")[column(t, "user") == user] for t in tables]
        present = [moments for moments in times if len(moments)]
        for earlier, later in pairwise(present):
            assert earlier.max() < later.min()


@pytest.mark.parametrize("folder", [*WINDOWS, "user"])
def test_histories_are_what_the_user_rated_strictly_before_the_row(
    rolling: Prepared, by_user: Prepared, folder: str
) -> None:
    out = by_user[0] if folder == "user" else rolling[0] / folder
    ratings = pq.read_table(SAMPLE / "ratings.parquet")
    movies = np.sort(column(pq.read_table(SAMPLE / "movies.parquet"), "movieId"))
    user = np.unique(column(ratings, "userId"), return_inverse=True)[1]
    item, time = np.searchsorted(movies, column(ratings, "movieId")), column(ratings, "timestamp")
    times_of_user = [np.sort(time[user == one]) for one in range(610)]
    # Nobody rated a movie twice, so that user and item name a rating.
    key = user * len(movies) + item
    order = np.argsort(key)
    key, time = key[order], time[order]
    for name in SPLITS:
        table = pq.read_table(out / name)
        own_user, own_time = column(table, "user"), column(table, "timestamp")
        lengths = pc.list_value_length(table["history"]).to_numpy()
        past = np.repeat(own_user, lengths) * len(movies)
        past += pc.list_flatten(table["history"]).to_numpy()
        assert (time[np.searchsorted(key, past)] < np.repeat(own_time, lengths)).all()
        own = zip(own_user, own_time, strict=True)
        older = [np.searchsorted(times_of_user[user], moment) for user, moment in own]
        assert lengths.tolist() == np.minimum(older, 20).tolist()


def test_cold_and_unseen_are_by_the_train_rows_of_the_same_window(rolling: Prepared) -> None:
    out, summary = rolling
    for window in WINDOWS:
        counts = np.bincount(column(pq.read_table(out / window / "train"), "item"), minlength=9742)
        trained = counts[column(pq.read_table(out / window / "test"), "item")]
        figures = summary[f"{window}/test"]
        assert figures["cold"] == pytest.approx(np.mean(trained < 5))
        assert figures["unseen"] == pytest.approx(np.mean(trained == 0))
    assert summary["window-1/test"]["unseen"] > summary["window-5/test"]["unseen"]


def test_the_items_of_all_windows_are_one_file(rolling: Prepared) -> None:
    items = [rolling[0] / window / "items" / "part-00000.parquet" for window in WINDOWS]
    assert len({path.stat().st_ino for path in items}) == 1


def test_items_are_copied_where_links_are_not_possible(
    tied_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_movielens(tied_source, tmp_path / "linked", split="rolling")

    def refuse(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    prepare_movielens(tied_source, tmp_path / "copied", split="rolling")
    assert files_in(tmp_path / "copied") == files_in(tmp_path / "linked")
    items = [tmp_path / "copied" / window / "items" / "part-00000.parquet" for window in WINDOWS]
    assert len({path.stat().st_ino for path in items}) == len(WINDOWS)


def test_no_window_appears_when_the_last_cannot_be_written(
    tied_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dataset.link_or_copy

    def fail_at_the_last(file: str, target: str) -> None:
        if "window-5" in target:
            raise OSError("disk full")
        write(file, target)

    monkeypatch.setattr(dataset, "link_or_copy", fail_at_the_last)
    with pytest.raises(OSError, match="disk full"):
        prepare_movielens(tied_source, tmp_path / "out", split="rolling")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_summary_names_each_window(rolling: Prepared) -> None:
    lines = format_summary(rolling[1]).splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == [f"{window}/{name}" for window in WINDOWS for name in SPLITS]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[1:4] == ["10,084", "40.94%", "74"]


def test_the_command_takes_protocol_and_history_length(
    tied_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "movielens", "--source", str(tied_source), "--out", str(tmp_path / "out")]
    assert main([*words, "--split", "rolling", "--history_length", "3"]) == 0
    assert "window-1/train" in capsys.readouterr().out
    for window in WINDOWS:
        histories = [row["history"] for row in read_split(tmp_path / "out" / window, "test")]
        assert max(map(len, histories)) == 3
