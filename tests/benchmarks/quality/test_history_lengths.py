"""Rows fall into slices by the history that the dataset has for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.quality.grid import Cell
from benchmarks.quality.history_lengths import history_lengths, history_table
from benchmarks.quality.study import CellResult
from recsys.evaluation.scores import SplitScores
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY


@dataclass(frozen=True)
class Run:
    data: str
    recipe: Path = TINY
    seed: int = 0


def cell_result(data: Path, num_rows: int, logits: np.ndarray, labels: np.ndarray) -> Any:
    scores = SplitScores(
        positions=np.arange(num_rows),
        groups=np.arange(num_rows) % 6,
        items=np.zeros(num_rows, int),
        counts=np.ones(num_rows, int),
        labels=labels[:, None].astype(np.float32),
        logits=logits[:, None].astype(np.float32),
        label_names=("liked",),
    )
    return CellResult(Cell("recipe", "", {}), [[Run(str(data))]], [[scores]])  # type: ignore[list-item]


def test_lengths_are_those_of_the_rows_in_their_order(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    table = pq.read_table(sorted((data / "test").glob("*.parquet"))[0])
    expected = [len(items or ()) for items in table["history"].to_pylist()]
    lengths = history_lengths(str(data), TINY)
    assert lengths is not None and lengths[: len(expected)].tolist() == expected


def test_gauc_is_of_the_rows_whose_history_is_of_the_length(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": 9, "valid": 9, "test": 240})
    labels = np.arange(240) // 6 % 2
    table = history_table([cell_result(data, 240, labels, labels)])
    assert table is not None
    header, _, row = table.splitlines()
    assert "under 5 (240 rows)" in header and "50 and more (0 rows)" in header
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "recipe",
        "1.0000",
        "–",
        "–",
        "–",
    ]
