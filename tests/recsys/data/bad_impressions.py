"""Bad impressions: what is done to a good dataset, and what the error must say.

The second training file holds the share of the second of two ranks; what is wrong in its last row
only that rank sees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.datasets import write_parquet

FILE = "train/part-1.parquet"
ROWS = 31  # of that file
LAST = f"row {ROWS - 1}"
ROW_GROUP_SIZE = 11


Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class BadInput:
    """How a good dataset is spoilt, the settings to train with, and messages of the error."""

    spoil: Spoil  # changes a dataset in place
    messages: list[str]
    settings: tuple[str, ...] = ("--content", "none")


def replace_column(name: str, array: pa.Array, file: str, data: Path) -> None:
    """Writes a file of the dataset again with another column."""
    table = pq.read_table(data / file)
    index = table.column_names.index(name)
    write_parquet(data / file, table.set_column(index, name, array), ROW_GROUP_SIZE)


def column(name: str, value: Any, kind: pa.DataType | None = None) -> Spoil:
    """The whole column holds `value`, of another type."""
    return partial(replace_column, name, pa.array([value] * ROWS, kind), FILE)


def last_value(name: str, value: Any, kind: pa.DataType | None = None, file: str = FILE) -> Spoil:
    """The column's last value is `value`."""

    def spoil(data: Path) -> None:
        good = pq.read_table(data / file)[name]
        array = pa.array([*good.to_pylist()[:-1], value], kind or good.type)
        replace_column(name, array, file, data)

    return spoil


def last_history(history: list[Any], liked: list[Any] | None) -> Spoil:
    """The last row's history and the list beside it."""

    def spoil(data: Path) -> None:
        last_value("history", history)(data)
        last_value("history_liked", liked)(data)

    return spoil


def table(change: Callable[[pa.Table], pa.Table]) -> Spoil:
    """The file's table is changed."""

    def spoil(data: Path) -> None:
        write_parquet(data / FILE, change(pq.read_table(data / FILE)), ROW_GROUP_SIZE)

    return spoil


def twice(name: str) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        return rows.append_column(name, rows[name])

    return change


TYPE = "schema.yaml"

TYPES = {
    "column missing": BadInput(
        table(lambda rows: rows.drop_columns(["liked"])),
        [f"{FILE}: column 'liked' is missing"],
    ),
    "column twice": BadInput(table(twice("item")), [f"{FILE}: column 'item'"]),
    "string ids in one of two files": BadInput(
        column("user", "a"), [f"{FILE}: column 'user'", "string", "integer", TYPE]
    ),
    "lists where one id belongs": BadInput(column("item", [1]), ["'item'", "list<", "integer"]),
}

VALUES = {
    "null id": BadInput(last_value("user", None), [f"{FILE}: column 'user', {LAST}: null"]),
    "null label": BadInput(last_value("liked", None), [f"{FILE}: column 'liked', {LAST}: null"]),
    "null in a list": BadInput(last_value("genres", [1, None]), [f"'genres', {LAST}: null inside"]),
    "NaN": BadInput(
        last_value("price", float("nan")),
        [f"{FILE}: column 'price', {LAST}: value nan"],
    ),
    "number beyond float32": BadInput(
        last_value("price", 1e300, pa.float64()), [f"'price', {LAST}: value inf", "fits float32"]
    ),
    "NaN beside the history": BadInput(
        last_history([1], [float("nan")]), [f"{FILE}: column 'history_liked', {LAST}: value nan"]
    ),
    "label that is neither 0 nor 1": BadInput(
        last_value("liked", 0.5), [f"{FILE}: column 'liked', {LAST}: value 0.5"]
    ),
    "negative id": BadInput(
        last_value("item", -1), [f"{FILE}: column 'item', {LAST}: id -1 is outside [0, 30)"]
    ),
    "id beyond its table": BadInput(
        last_value("user", 10), [f"'user', {LAST}: id 10 is outside [0, 10); raise num_embeddings"]
    ),
    "history of unknown items": BadInput(
        last_history([1, 30], [1, 1]),
        [f"'history', {LAST}: id 30 is outside [0, 30); raise num_embeddings of 'item'"],
    ),
    "list beside the history too short": BadInput(
        last_history([1, 2], [1]),
        [f"'history_liked', {LAST}: ", "'history' (2 items)"],
    ),
    "bad row in validation": BadInput(
        last_value("item", 77, file="valid/part-0.parquet"),
        ["valid/part-0.parquet: column 'item', row 24: id 77 is outside [0, 30)"],
    ),
}
