"""Counts and other numbers of wide range: standardised, or named when they make a model useless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.checkpoint.partitions import ContinualFolder
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from tests.recsys.training.changed_answers import set_column
from tests.recsys.training.continual.walk_runs import (
    NAMES,
    WITHOUT_CONTENT,
    lines_of,
    walk,
    write_walk,
)

RAW = ["--ranking.scale_inputs", "false"]


def write_counts(folder: Path, *highest: float) -> Path:
    """A walk whose prices, and numbers beside the history, go from 0 to so much on each day."""
    write_walk(folder, len(highest))
    for name, most in zip(NAMES, highest, strict=False):
        for file in sorted((folder / "train" / name).glob("*.parquet")):
            table, rng = pq.read_table(file), np.random.default_rng(7)
            counts = rng.integers(0, most + 1, table.num_rows).astype(np.float32)
            counts[:2] = 0, most
            lists = [
                None if answers is None else (np.array(answers) * most).tolist()
                for answers in table["history_liked"].to_pylist()
            ]
            table = set_column(table, "price", pa.array(counts))
            table = set_column(table, "history_liked", pa.array(lists, pa.list_(pa.float32())))
            pq.write_table(table, file, row_group_size=11)
    return folder


@pytest.mark.parametrize("name", ["din_dcn", "two_tower"])
def test_counts_are_standardized_by_default(name: str, tmp_path: Path) -> None:
    write_counts(tmp_path / "data", 340, 340)
    words = [*WITHOUT_CONTENT, "--ranking.name", name]
    if name == "two_tower":
        words += ["--ranking.query_features", "[price]"]
    walk(tmp_path, tmp_path / "run", *words)
    (line,) = lines_of(tmp_path / "run")
    assert line["logloss"] < 1


def test_useless_scores_end_the_walk_with_the_column_behind_what_is_written(
    tmp_path: Path,
) -> None:
    write_counts(tmp_path / "data", 340, 340, 340)
    words = [*WITHOUT_CONTENT, *RAW]
    message = rf"{NAMES[1]}, scored by the model of {NAMES[0]}: .*'price' \(0 to 340\)"
    with pytest.raises(ValueError, match=message):
        walk(tmp_path, tmp_path / "run", *words)
    state = ContinualFolder(tmp_path / "run").read()
    assert [partition.name for partition in state.trained] == NAMES[:2] and state.begun is None
    with pytest.raises(ValueError, match=NAMES[2]):
        walk(tmp_path, tmp_path / "run", *words)
    assert [line["partition"] for line in lines_of(tmp_path / "run")] == NAMES[1:3]


def test_a_column_is_standardized_from_the_day_on_that_it_is_wide(tmp_path: Path) -> None:
    write_counts(tmp_path / "data", 1, 1, 4)
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT)
    folder = ContinualFolder(tmp_path / "run")
    with joined_ranks("cpu") as ranks:
        scalings = [
            load_run(folder.run_of(name), None, ranks, "cpu").em3.scaling for name in NAMES[1:3]
        ]
    assert scalings[0] is not None and scalings[1] is not None
    assert scalings[0].names == ["price", "history_liked"] and not scalings[0].is_scaled.any()
    prices = pq.read_table(tmp_path / "data" / "train" / NAMES[2])["price"].to_numpy()
    assert scalings[1].is_scaled.all()
    assert float(scalings[1].mean[0]) == pytest.approx(prices.mean(), rel=1e-5)
    assert float(scalings[1].deviation[0]) == pytest.approx(prices.std(), rel=1e-5)
