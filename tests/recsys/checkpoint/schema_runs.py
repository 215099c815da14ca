"""A dataset with columns of every kind, two of each that a model reads by place, and changes of it.

A change is named by what it does to `schema.yaml` or to the files of a copy of the dataset.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from recsys.data.prepare import prepare_vocabularies
from tests.datasets import write_dataset

COLUMNS: dict[str, dict[str, Any]] = {
    "user": {
        "kind": "id",
        "num_embeddings": 12,
        "vocabulary": {"kind": "bounded", "admit_after": 2, "half_life": 50.0},
    },
    "friends": {"kind": "ids", "shares": "user"},
    "item": {"kind": "id", "num_embeddings": 40, "vocabulary": {"kind": "exact"}},
    "history": {"kind": "sequence", "shares": "item", "parallel": ["history_liked", "history_age"]},
    "genres": {
        "kind": "ids",
        "num_embeddings": 50,
        "vocabulary": {"kind": "hash", "num_hashes": 2, "seed": 1},
    },
    "shop": {"kind": "id", "num_embeddings": 5},
    "price": {"kind": "dense"},
    "age": {"kind": "dense"},
    "liked": {"kind": "label"},
    "bought": {"kind": "label"},
    "teacher": {"kind": "extra"},
    "other": {"kind": "extra"},
}
SCHEMA: dict[str, Any] = {
    "target_item": "item",
    "group": "user",
    "columns": COLUMNS,
    "items": {
        "id": "item",
        "columns": {"text": {"kind": "text"}, "poster": {"kind": "image"}},
    },
}


def write_data(folder: Path) -> Path:
    """Writes the dataset and its exact map."""
    write_dataset(folder)
    write_schema(folder, SCHEMA)
    for split in ("train", "valid", "test"):
        for file in sorted((folder / split).glob("*.parquet")):
            pq.write_table(_with_columns(pq.read_table(file)), file, row_group_size=11)
    prepare_vocabularies(str(folder))
    return folder


def _with_columns(table: pa.Table) -> pa.Table:
    random = np.random.default_rng(table.num_rows)
    count = table.num_rows
    lists = table["history_liked"].to_pylist()
    columns = {
        "friends": pa.array([[f"u{n}"] for n in random.integers(12, size=count)]),
        "history_age": [None if row is None else [x + 0.5 for x in row] for row in lists],
        "shop": random.integers(5, size=count),
        "age": random.random(count).astype(np.float32),
        "bought": random.integers(2, size=count).astype(np.float32),
        "teacher": random.random(count).astype(np.float32),
        "other": random.random(count).astype(np.float32),
    }
    for name, column in columns.items():
        table = table.append_column(name, pa.array(column))
    users = pc.binary_join_element_wise("u", table["user"].cast(pa.string()), "")
    return table.set_column(table.column_names.index("user"), "user", users)


def write_schema(folder: Path, schema: dict[str, Any]) -> None:
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))


def copy_of(data: Path, folder: Path) -> Path:
    """A copy of the dataset whose files may be written anew."""
    shutil.copytree(data, folder, dirs_exist_ok=True)
    return folder


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes every file in a folder of the dataset."""
    for file in sorted(folder.glob("*.parquet")):
        pq.write_table(change(pq.read_table(file)), file, row_group_size=11)


def with_other_type(table: pa.Table, name: str) -> pa.Table:
    """The ids of a column as strings, or as integers if they are strings."""
    column = table[name].combine_chunks()
    is_list = pa.types.is_list(column.type)
    values = column.flatten() if is_list else column
    if pa.types.is_string(values.type):
        other = pc.replace_substring(values, "u", "").cast(pa.int64())
    else:
        other = values.cast(pa.string())
    if is_list:
        other = pa.ListArray.from_arrays(column.offsets, other)
    return table.set_column(table.column_names.index(name), name, other)
