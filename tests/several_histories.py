"""The small synthetic dataset with two further histories and lists of ids beside them.

`bought` has the item's table, `searched` one of its own with a bounded vocabulary; the shops beside
`history` and `bought` share a table of hashes with two rows per id.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.datasets import write_dataset

COLUMNS = """\
  history: {kind: sequence, shares: item, parallel: [history_liked, history_shop]}
  history_shop: {kind: ids, num_embeddings: 7, vocabulary: {kind: hash, num_hashes: 2}}
  bought: {kind: sequence, shares: item, parallel: [bought_shop, bought_price]}
  bought_shop: {kind: ids, shares: history_shop}
  searched: {kind: sequence, num_embeddings: 9, vocabulary: {kind: bounded}}
"""
ONE = "  history: {kind: sequence, shares: item, parallel: [history_liked]}\n"


def write_several_histories(
    folder: Path, columns: str = COLUMNS, is_empty: bool = False, **sizes: Any
) -> Path:
    """Writes the dataset with `columns` in place of its history; returns `folder`."""
    write_dataset(folder, **sizes)
    schema = folder / "schema.yaml"
    assert ONE in schema.read_text()
    schema.write_text(schema.read_text().replace(ONE, columns))
    for number, path in enumerate(sorted(folder.glob("[tv]*/*.parquet"))):
        table = pq.read_table(path)
        pq.write_table(_with_extra_columns(table, np.random.default_rng(number), is_empty), path)
    return folder


def _with_extra_columns(table: pa.Table, rng: np.random.Generator, is_empty: bool) -> pa.Table:
    shops = np.array(["north", "south", "east", "west"])
    sizes = rng.integers(1 if is_empty else 4, size=(2, table.num_rows))
    columns: dict[str, list[Any]] = {
        "history_shop": [
            None if items is None else rng.choice(shops, len(items)).tolist()
            for items in table["history"].to_pylist()
        ],
        "bought": [rng.integers(30, size=size).tolist() for size in sizes[0]],
        "bought_shop": [rng.choice(shops, size).tolist() for size in sizes[0]],
        "bought_price": [rng.random(size).tolist() for size in sizes[0]],
        "searched": [rng.integers(1000, 1012, size=size).tolist() for size in sizes[1]],
    }
    types = {"bought_shop": pa.string(), "history_shop": pa.string(), "bought_price": pa.float32()}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.list_(types.get(name, pa.int64()))))
    return table
