"""Load pretrained vectors from Parquet into the shards of a table, by id.

Each rank reads the files by row groups; pyarrow.dataset would hold them whole.
Shapes: N rows of one block of a file, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyarrow.fs import FileSystem
from torch import nn

from embeddings.sharding import table_parameters
from embeddings.table_rows import TableShard
from embeddings.table_state import table_weights

BLOCK_BYTES = 2**24  # vectors decoded at a time
READ_BYTES = 2**20  # read at a time, as a row group may be a whole file
TABLE_COLUMN = "table"

# Ids as stored in a file -> rows of the table, int64 [N]; -1 leaves an id out.
RowsOfIds = Callable[[pa.Array], np.ndarray]


@dataclass(frozen=True)
class PretrainedFiles:
    """Parquet files with one vector per id, each id once in all files together.

    Ids are integers, vectors lists of floats; a column ``table`` selects the rows of a table.

    Example::

        from embeddings import PretrainedFiles

        PretrainedFiles(["item_vectors.parquet"], id_column="item", vector_column="vector")
    """

    paths: Sequence[str]
    filesystem: FileSystem | None = None  # None: local
    id_column: str | None = None  # None: `id`, or `row` in a file without it
    vector_column: str = "vector"
    table: str | None = None  # name in the column `table`; None: that of the table loaded into


@dataclass(frozen=True)
class PretrainedBlock:
    """Some rows of one file, all checked except for the ids."""

    file: str
    id_column: str
    ids: pa.Array  # [N], without null
    vectors: np.ndarray  # float32 [N, D], finite
    positions: np.ndarray  # [N] rows in the file, for messages

    def id_error(self, index: int, fault: str) -> ValueError:
        text = f"id {self.ids[index].as_py()}{fault}"
        return _error(self.file, self.id_column, self.positions[index], text)

    def rows(self, rows_of_ids: RowsOfIds | None) -> np.ndarray:
        """Return the rows of the ids, int64 [N]; without ``rows_of_ids`` the ids themselves."""
        if rows_of_ids is not None:
            try:
                return rows_of_ids(self.ids)
            except ValueError as error:
                raise ValueError(f"{self.file}: column '{self.id_column}': {error}") from error
        if not pa.types.is_integer(self.ids.type):
            raise ValueError(
                f"{self.file}: column '{self.id_column}' has type {self.ids.type}, but ids are "
                "integers; write rows of the table or name another column"
            )
        return self.ids.cast(pa.int64(), safe=False).to_numpy()


def _read_pretrained(files: PretrainedFiles, table: str, dim: int) -> Iterator[PretrainedBlock]:
    for path in files.paths:
        try:
            with pq.ParquetFile(
                path, filesystem=files.filesystem, pre_buffer=False, buffer_size=READ_BYTES
            ) as file:
                yield from _read_file(path, file, files, table, dim)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file") from error
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


def _read_file(
    path: str, file: pq.ParquetFile, files: PretrainedFiles, table: str, dim: int
) -> Iterator[PretrainedBlock]:
    names = file.schema_arrow.names
    id_column = files.id_column or ("id" if "id" in names else "row")
    columns = [id_column, files.vector_column]
    for name in columns:
        if name not in names:
            raise ValueError(f"{path}: column '{name}' is missing; the file has {names}")
    _check_type(path, file.schema_arrow.field(files.vector_column), dim)
    if TABLE_COLUMN in names:
        columns.append(TABLE_COLUMN)
        _check_names_tables(path, file.schema_arrow.field(TABLE_COLUMN).type)
    for positions, batch in _batches(file, columns, table, height=max(1, BLOCK_BYTES // (4 * dim))):
        ids, lists = batch[id_column], batch[files.vector_column]
        for column, array in [(id_column, ids), (files.vector_column, lists)]:
            if array.null_count:
                index = int(array.is_null().to_numpy(False).argmax())
                raise _error(path, column, positions[index], "null; fill it or drop the row")
        vectors = lists.flatten().cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        if (bad_vector := _bad_vector(lists, vectors, dim)) is not None:
            raise _error(path, files.vector_column, positions[bad_vector[0]], bad_vector[1])
        yield PretrainedBlock(path, id_column, ids, vectors.reshape(-1, dim), positions)


def _batches(
    file: pq.ParquetFile, columns: list[str], table: str, height: int
) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """Yield rows of the table with their places in the file."""
    position = 0
    for index in range(file.num_row_groups):
        row_group = file.metadata.row_group(index)
        if TABLE_COLUMN in columns and not _may_hold(row_group, table):
            position += row_group.num_rows
            continue
        for batch in file.iter_batches(height, row_groups=[index], columns=columns):
            positions = np.arange(position, position + len(batch))
            position += len(batch)
            if TABLE_COLUMN in columns:
                mine = pc.fill_null(pc.equal(batch[TABLE_COLUMN].cast(pa.string()), table), False)
                batch, positions = batch.filter(mine), positions[mine.to_numpy(False)]
            yield positions, batch


def _may_hold(row_group: pq.RowGroupMetaData, table: str) -> bool:
    """Return whether the row group can hold ``table``, by the statistics of its table column."""
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        if column.path_in_schema == TABLE_COLUMN and column.is_stats_set:
            statistics = column.statistics
            return not statistics.has_min_max or statistics.min <= table <= statistics.max
    return True


def _check_type(path: str, field: pa.Field, dim: int) -> None:
    kind = field.type
    is_fixed = pa.types.is_fixed_size_list(kind)
    is_list = is_fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise ValueError(
            f"{path}: column '{field.name}' has type {kind}, expected a list of floats; write it "
            "with that type or name another column"
        )
    if is_fixed and kind.list_size != dim:
        raise ValueError(f"{path}: column '{field.name}': {_wrong_width(kind.list_size, dim)}")


def _check_names_tables(path: str, kind: pa.DataType) -> None:
    name = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(name) or pa.types.is_large_string(name)):
        raise ValueError(
            f"{path}: column '{TABLE_COLUMN}' has type {kind}, but it names the table of a row; "
            "write strings or rename the column"
        )


def _wrong_width(width: int, dim: int) -> str:
    return (
        f"vectors of {width} numbers for a table of dimension {dim}; set embedding_dim to {width} "
        f"or write vectors of {dim}"
    )


def _bad_vector(lists: pa.Array, numbers: np.ndarray, dim: int) -> tuple[int, str] | None:
    """Return the index of the first list that cannot be used, and the reason."""
    if not pa.types.is_fixed_size_list(lists.type):
        lengths = pc.list_value_length(lists).to_numpy()
        if (lengths != dim).any():
            index = int((lengths != dim).argmax())
            return index, _wrong_width(lengths[index], dim)
    if lists.flatten().null_count:
        index = int(lists.flatten().is_null().to_numpy(False).argmax())
        return index // dim, "null inside the vector; fill it or drop the row"
    finite = np.isfinite(numbers)
    if not finite.all():
        index = int((~finite).argmax())
        value = lists.flatten()[index].as_py()
        return index // dim, f"value {value}; write a finite number that fits float32"
    return None


def _error(file: str, column: str, row: int, fault: str) -> ValueError:
    return ValueError(f"{file}: column '{column}', row {row}: {fault}")


@dataclass(frozen=True)
class LoadedRows:
    """Counts of table rows that were set and of ids in the files that were left out."""

    num_set: int
    num_left_out: int


def load_pretrained_rows(
    model: nn.Module,
    table: str,
    files: PretrainedFiles,
    rows_of_ids: RowsOfIds | None = None,
    may_be_empty: bool = False,
) -> LoadedRows:
    """Write vectors into a table of ``model``, before its first step; call it on every rank.

    The model is sharded under any plan, or unsharded and not on meta. ``rows_of_ids`` maps ids of
    the files to rows; by default an id is its row.

    Raises:
        ValueError: no such table, or a file, an id or the rows cannot be used. A repeated row is
            an error on the ranks that hold it.

    Example::

        import pyarrow as pa
        import pyarrow.parquet as pq
        from embeddings import PretrainedFiles, TableConfig
        from embeddings import build_embedding_collection, load_pretrained_rows

        model = build_embedding_collection([TableConfig("item", 100, 4, ["item"])], "cpu")
        vectors = pa.array([[1.0, 2.0, 3.0, 4.0]], pa.list_(pa.float32()))
        pq.write_table(pa.table({"id": [7], "vector": vectors}), "item_vectors.parquet")
        load_pretrained_rows(model, "item", PretrainedFiles(["item_vectors.parquet"]))
    """
    target, stored_name = _Target(model, table), files.table or table
    num_set = num_left_out = 0
    for block in _read_pretrained(files, stored_name, target.dim):
        rows = block.rows(rows_of_ids)
        has_row = np.ones(len(rows), dtype=bool) if rows_of_ids is None else rows != -1
        target.check(block, rows, has_row)
        for shard in target.shards:
            shard.write(torch.tensor(rows), torch.tensor(block.vectors))
        num_set += int(has_row.sum())
        num_left_out += int((~has_row).sum())
    if num_set == 0 and not may_be_empty:
        where = ", ".join(files.paths) or "no files"
        fault = f"none of the {num_left_out} ids is known" if num_left_out else "none is there"
        raise ValueError(
            f"{where}: no row for table '{table}': {fault} (of '{stored_name}' where the "
            "files have a column 'table'); name the files, or the table in them, that hold it"
        )
    return LoadedRows(num_set, num_left_out)


class _Target:
    """A table of a model: its shards on this rank, and which of their rows are set."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        sharded = {key.split(".")[-2]: weight for key, weight in table_weights(model).items()}
        whole = dict(table_parameters(model))
        if name in sharded:
            self.num_rows, self.dim = sharded[name].metadata().size
            self.shards = [
                TableShard(shard.tensor.detach(), [], *shard.metadata.shard_offsets)
                for shard in sharded[name].local_shards()
                if shard.tensor.numel()
            ]
        elif name not in whole:
            tables = [*sharded, *whole]
            raise ValueError(f"table '{name}' is not in the model; the tables are {tables}")
        elif whole[name].is_meta:
            raise ValueError(f"table '{name}' is on meta; shard the model before loading")
        else:
            self.num_rows, self.dim = whole[name].shape
            self.shards = [TableShard(whole[name].detach(), [], 0, 0)]
        self._first = min((shard.row for shard in self.shards), default=0)
        last = max((shard.row + len(shard.weight) for shard in self.shards), default=0)
        self._is_set = np.zeros(last - self._first, dtype=bool)

    def check(self, block: PretrainedBlock, rows: np.ndarray, has_row: np.ndarray) -> None:
        """Reject rows int64 [N] outside the table, unless not known, and rows set before."""
        outside = has_row & ((rows < 0) | (rows >= self.num_rows))
        if outside.any():
            raise block.id_error(
                int(outside.argmax()),
                f" is outside [0, {self.num_rows}), the rows of table '{self.name}'; raise "
                "num_embeddings or drop the row",
            )
        local = np.flatnonzero((rows >= self._first) & (rows < self._first + len(self._is_set)))
        places = rows[local] - self._first
        repeated = self._is_set[places]
        first_places = np.unique(places, return_index=True)[1]
        repeated[np.setdiff1d(np.arange(len(places)), first_places)] = True
        if repeated.any():
            index = int(local[repeated.argmax()])
            raise block.id_error(
                index,
                f": row {rows[index]} of table '{self.name}' has a vector already; keep one per "
                "row",
            )
        self._is_set[places] = True
