"""GAUC of each cell by the length of the user's history, which shows the quality for new users."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.results import markdown_table
from recsys.config import load_config
from recsys.data.parquet.columns import RowColumns
from recsys.data.row_source import open_rows
from recsys.data.schema import load_schema
from recsys.evaluation.bootstrap import metric_users, pooled_metric
from recsys.evaluation.metrics import in_parentheses
from recsys.evaluation.scores import SplitScores
from recsys.storage.location import Location

if TYPE_CHECKING:
    from benchmarks.quality.study import CellResult

SLICES = {"under 5": (0, 5), "5 to 19": (5, 20), "20 to 49": (20, 50), "50 and more": (50, 10**9)}


@cache
def history_lengths(data: str, recipe: Path) -> np.ndarray | None:  # int64 [N]
    """Return the items in the history of each test row, in their order; None without histories."""
    root = Location.of(data)
    schema = load_schema(root)
    if schema.history is None:
        return None
    rows = open_rows(load_config(recipe).source, root, "test", schema)
    tables = rows.read(*rows.share(0, 1))
    return np.concatenate([RowColumns.of(table).lengths(schema.history) for table in tables])


def history_table(results: Sequence[CellResult]) -> str | None:
    """Return a table of the GAUC by slice, median over seeds; None for data without histories."""
    rows, counts = [], np.zeros(len(SLICES), int)
    for result in results:
        lengths = [history_lengths(run.data, run.recipe) for run in result.runs[0]]
        if any(values is None for values in lengths):
            return None
        cells = []
        for index, (first, last) in enumerate(SLICES.values()):
            slices = [
                [_slice(scores, values, first, last) for scores, values in zip(windows, lengths)]
                for windows in result.scores
            ]
            counts[index] = sum(len(scores.positions) for scores in slices[0])
            cells.append(_gauc(slices))
        rows.append([result.cell.name, *cells])
    titles = [f"{name} ({count:,} rows)" for name, count in zip(SLICES, counts)]
    return markdown_table(("GAUC by items in the history", *titles), rows)


def _slice(scores: SplitScores, lengths: np.ndarray | None, first: int, last: int) -> SplitScores:
    assert lengths is not None
    row_lengths = lengths[scores.positions]
    return scores.take((row_lengths >= first) & (row_lengths < last))


def _gauc(slices: list[list[SplitScores]]) -> str:
    windows = [[scores for scores in seed if len(scores.positions)] for seed in slices]
    values = [pooled_metric(seed, "gauc", "all") for seed in windows if seed]
    defined = [value for value in values if value is not None]
    if not defined:
        return "–"
    return in_parentheses(f"{median(defined):.4f}", metric_users(windows[0], "gauc", "all"))
