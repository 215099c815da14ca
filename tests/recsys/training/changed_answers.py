"""Other answers in the rows of a dataset that `tests.datasets` writes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def shuffle_labels(folder: Path, seed: int, unchanged: Sequence[int] = ()) -> None:
    """Permute the labels of a folder of rows, and draw the answers in their histories anew.

    Rows `unchanged` keep their histories.
    """
    rng, first = np.random.default_rng(seed), 0
    for file in sorted(folder.glob("*.parquet")):
        table = pq.read_table(file)
        liked = rng.permutation(table["liked"].to_numpy())
        histories = table["history_liked"].to_pylist()
        for row, liked_values in enumerate(histories):
            if liked_values is not None and first + row not in unchanged:
                histories[row] = rng.integers(2, size=len(liked_values)).astype(float).tolist()
        table = set_column(table, "liked", pa.array(liked, pa.float32()))
        kind = pa.list_(pa.float32())
        table = set_column(table, "history_liked", pa.array(histories, kind))
        pq.write_table(table, file, row_group_size=11)
        first += table.num_rows
