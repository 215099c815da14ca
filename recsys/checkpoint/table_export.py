"""Export the ID tables of a checkpoint as one Parquet file, a block of rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from recsys.checkpoint.reader import BLOCK_BYTES, SafeFileSystemReader, StoredTensor
from recsys.storage.files import whole_file
from recsys.storage.output_file import check_output

# Names in the two collections of recsys.model.em3.EM3.
_TABLE_KEY = re.compile(
    r"model\.(?:embeddings\.embeddings|embedding_bags\.embedding_bags)\.([^.]+)\.weight"
)


def export_tables(folder: Path, out: Path, tables: list[str] | None = None) -> dict[str, int]:
    """Write tables of a checkpoint to one Parquet file; return the number of rows by table.

    Columns: ``table``, ``row`` (int64, the id that looks it up) and ``vector``,
    ``fixed_size_list<float32, D>``, or ``list<float32>`` if dimensions D differ. Every row group
    belongs to one table.

    Args:
        folder: a checkpoint of a model, such as `RUN/checkpoints/best`, of any plan.
        out: the file to write; it appears complete or not at all.
        tables: names of the tables; default all.

    Raises:
        ValueError: `folder` is no checkpoint, has no such table, or is damaged; or `out` cannot be
            written, or is part of a run or dataset.
    """
    check_output(out)
    stored = stored_tables(folder)
    names = list(dict.fromkeys(tables or sorted(stored)))
    for name in names:
        if name not in stored:
            raise ValueError(f"{folder}: no table '{name}'; the tables are {sorted(stored)}")
    selected = [stored[name] for name in names]
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        _write(selected, partial)
    return {table.name: table.num_rows for table in selected}


@dataclass(frozen=True)
class StoredTable(StoredTensor):
    """A table in a checkpoint, readable by ranges of its rows."""

    name: str

    @property
    def num_rows(self) -> int:
        return self.size[0]

    @property
    def dim(self) -> int:
        return self.size[1]

    @property
    def title(self) -> str:
        return f"table '{self.name}'"

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the rows `[start, stop)` as float32 [stop - start, D], as `StoredTensor.rows`."""
        return super().rows(start, stop).float()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the vectors [rows, D] of each block, in the order of rows."""
        height = max(1, BLOCK_BYTES // (4 * self.dim))
        for start in range(0, self.num_rows, height):
            yield start, self.rows(start, min(start + height, self.num_rows))


def require_model_alone(folder: Path) -> None:
    """Raise a ValueError for the checkpoint of a step in place of the best model."""
    names = SafeFileSystemReader(folder).read_metadata().state_dict_metadata
    if any(name.startswith("optimizer.") for name in names):
        raise ValueError(
            f"{folder}: the state of a step, not that of the best model; bring the folder back, or "
            "train again"
        )


def table_of_key(key: str) -> str | None:
    """Return the table whose weight, or a tensor beside it, has this name in a checkpoint."""
    match = _TABLE_KEY.match(key)
    return None if match is None else match[1]


def stored_tables(folder: Path) -> dict[str, StoredTable]:
    """Return the tables of a checkpoint by name."""
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder}: no checkpoint; export the run of a finished training")
    reader = SafeFileSystemReader(folder)
    metadata = reader.read_metadata()
    tables = {}
    for key in metadata.state_dict_metadata:
        if match := _TABLE_KEY.fullmatch(key):
            tables[match[1]] = StoredTable(reader, metadata, key, match[1])
    if not tables:
        raise ValueError(f"{folder}: a checkpoint without tables; name one that `train` wrote")
    return tables


def _write(tables: list[StoredTable], path: Path) -> None:
    dims = {table.dim for table in tables}
    vectors = pa.list_(pa.float32(), dims.pop() if len(dims) == 1 else -1)
    schema = pa.schema(
        {"table": pa.dictionary(pa.int32(), pa.string()), "row": pa.int64(), "vector": vectors}
    )
    # Weights hardly ever repeat: a dictionary of them would only cost memory and time.
    with pq.ParquetWriter(
        path, schema, use_dictionary=["table"], write_statistics=["table", "row"]
    ) as writer:
        for table in tables:
            for start, block in table.blocks():
                names = pa.repeat(table.name, len(block)).dictionary_encode()
                rows = pa.array(np.arange(start, start + len(block)))
                values = pa.array(block.numpy().reshape(-1))
                lists = pa.FixedSizeListArray.from_arrays(values, table.dim).cast(vectors)
                writer.write_table(pa.Table.from_arrays([names, rows, lists], schema=schema))
