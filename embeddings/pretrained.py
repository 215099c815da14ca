"""Load pretrained vectors from Parquet into the shards of a table, by id.

Each rank streams the files in blocks; pyarrow.dataset would hold whole files in memory.
Shapes: N rows of one block of a file, D dimension.
"""

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

BLOCK_BYTES = 2**24  # bytes of vectors decoded at a time
READ_BYTES = 2**20  # bytes read at a time, as a row group may be a whole file
TABLE_COLUMN = "table"

# Ids as stored in a file -> rows of the table, int64 [N]; ids with row -1 are skipped.
RowsOfIds = Callable[[pa.Array], np.ndarray]


@dataclass(frozen=True)
class PretrainedFiles:
    """Parquet files with one vector per id; no id may occur twice, not even in two files.

    Ids are integers, vectors are lists of floats. A column ``table`` names the table of each row.

    Example::

        from embeddings import PretrainedFiles

        PretrainedFiles(["item_vectors.parquet"], id_column="item", vector_column="vector")
    """

    paths: Sequence[str]
    filesystem: FileSystem | None = None  # None: local
    id_column: str | None = None  # None: `id`, or `row` in a file without it
    vector_column: str = "vector"
    table: str | None = None  # value in the column `table`; None: the loaded table's name


@dataclass(frozen=True)
class _Block:
    """Some rows of one file that belong to the table to load."""

    file: str
    positions: np.ndarray  # [N] rows in the file
    ids: pa.Array  # [N]
    lists: pa.Array  # [N]

    def require(self, good: np.ndarray, column: str, fault: Callable[[int], str]) -> None:
        """Raise a ValueError with the location of the first row that is not good [N]."""
        if not good.all():
            index = int((~good).argmax())
            where = f"{self.file}: column '{column}', row {self.positions[index]}"
            raise ValueError(f"{where}: {fault(index)}")


def _read_pretrained(files: PretrainedFiles, table: str, dim: int) -> Iterator[tuple[str, _Block]]:
    """Yield blocks of rows, each with the name of the id column of its file."""
    for path in files.paths:
        try:
            options = {"pre_buffer": False, "buffer_size": READ_BYTES}
            with pq.ParquetFile(path, filesystem=files.filesystem, **options) as file:
                schema = file.schema_arrow
                id_column = files.id_column or ("id" if "id" in schema.names else "row")
                for name in (id_column, files.vector_column):
                    if name not in schema.names:
                        raise ValueError(
                            f"{path}: column '{name}' is missing; the file has {schema.names}"
                        )
                kind = schema.field(files.vector_column).type
                is_floating = pa.types.is_floating(getattr(kind, "value_type", kind))
                if not is_floating or kind.num_fields != 1:
                    raise ValueError(
                        f"{path}: column '{files.vector_column}' has type {kind}, expected a list "
                        "of floats; write it with that type or name another column"
                    )
                columns = [id_column, files.vector_column]
                columns += [TABLE_COLUMN] if TABLE_COLUMN in schema.names else []
                end = 0
                for batch in file.iter_batches(max(1, BLOCK_BYTES // (4 * dim)), columns=columns):
                    positions = np.arange(end, end + len(batch))
                    end += len(batch)
                    if TABLE_COLUMN in columns:
                        mask = pc.equal(batch[TABLE_COLUMN].cast(pa.string()), table)
                        mask = pc.fill_null(mask, False)
                        batch, positions = batch.filter(mask), positions[mask.to_numpy(False)]
                    ids, lists = batch[id_column], batch[files.vector_column]
                    yield id_column, _Block(path, positions, ids, lists)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file") from error
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


def _vectors(
    block: _Block, column: str, dim: int, table_type: torch.dtype
) -> np.ndarray:  # float32 [N, D]
    """Return the vectors of a block; a ValueError names the first that cannot be used."""
    lists = block.lists
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    block.require(lengths >= 0, column, lambda _: "null; fill it or drop the row")
    block.require(
        lengths == dim,
        column,
        lambda index: (
            f"vectors of {lengths[index]} numbers for a table of dimension {dim}; set "
            f"embedding_dim to {lengths[index]} or write vectors of {dim}"
        ),
    )
    numbers = lists.flatten().cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    vectors: np.ndarray = numbers.reshape(-1, dim)  # null is NaN
    is_finite = torch.tensor(vectors).to(table_type).isfinite()
    block.require(
        is_finite.all(dim=1).numpy(),
        column,
        lambda index: (
            f"value {lists[index].as_py()[int(is_finite[index].int().argmin())]}; write a finite "
            f"number that fits {str(table_type).removeprefix('torch.')}"
        ),
    )
    return vectors


def _rows(block: _Block, id_column: str, rows_of_ids: RowsOfIds | None) -> np.ndarray:  # [N]
    is_valid = block.ids.is_valid().to_numpy(zero_copy_only=False)
    block.require(is_valid, id_column, lambda _: "null; fill it or drop the row")
    where = f"{block.file}: column '{id_column}'"
    if rows_of_ids is not None:
        try:
            return rows_of_ids(block.ids)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not pa.types.is_integer(block.ids.type):
        raise ValueError(
            f"{where} has type {block.ids.type}, but ids are integers; write rows of the table or "
            "name another column"
        )
    return np.asarray(block.ids.cast(pa.int64(), safe=False).to_numpy())


@dataclass(frozen=True)
class LoadedRows:
    """Number of table rows that were set, and of ids in the files that were skipped."""

    num_set: int
    num_skipped: int


def load_pretrained_rows(
    model: nn.Module,
    table: str,
    files: PretrainedFiles,
    rows_of_ids: RowsOfIds | None = None,
    may_be_empty: bool = False,
) -> LoadedRows:
    """Write vectors into a table of ``model``, before its first step; call it on every rank.

    The model is sharded under any plan, or unsharded and not on meta. ``rows_of_ids`` maps ids of
    the files to rows; by default an id is its row. Raises a ValueError for a table, file, id or
    row that cannot be used; for a repeated row, only on the ranks that hold the row.

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
    num_set = num_skipped = 0
    for id_column, block in _read_pretrained(files, stored_name, target.dim):
        rows = _rows(block, id_column, rows_of_ids)
        vectors = _vectors(block, files.vector_column, target.dim, target.type)
        has_row = np.ones(len(rows), dtype=bool) if rows_of_ids is None else rows != -1
        target.check(block, id_column, rows, has_row)
        for shard in target.shards:
            shard.write(torch.tensor(rows), torch.tensor(vectors))
        num_set += int(has_row.sum())
        num_skipped += int((~has_row).sum())
    if num_set == 0 and not may_be_empty:
        where = ", ".join(files.paths) or "no files"
        fault = f"none of the {num_skipped} ids is known" if num_skipped else "none is there"
        raise ValueError(
            f"{where}: no row for table '{table}': {fault} (of '{stored_name}' where the "
            "files have a column 'table'); name the files, or the table in them, that hold it"
        )
    return LoadedRows(num_set, num_skipped)


class _Target:
    """A table of a model: its shards on this rank, and which of their rows are set."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        sharded = {key.split(".")[-2]: weight for key, weight in table_weights(model).items()}
        unsharded = dict(table_parameters(model))
        if name in sharded:
            self.type = sharded[name].metadata().tensor_properties.dtype
            self.num_rows, self.dim = sharded[name].metadata().size
            self.shards = [
                TableShard(shard.tensor.detach(), [], *shard.metadata.shard_offsets)
                for shard in sharded[name].local_shards()
                if shard.tensor.numel()
            ]
        elif name not in unsharded:
            tables = [*sharded, *unsharded]
            raise ValueError(f"table '{name}' is not in the model; the tables are {tables}")
        elif unsharded[name].is_meta:
            raise ValueError(f"table '{name}' is on meta; shard the model before loading")
        else:
            self.type, (self.num_rows, self.dim) = unsharded[name].dtype, unsharded[name].shape
            self.shards = [TableShard(unsharded[name].detach(), [], 0, 0)]
        self._first = min((shard.row for shard in self.shards), default=0)
        last = max((shard.row + len(shard.weight) for shard in self.shards), default=0)
        self._is_set = np.zeros(last - self._first, dtype=bool)

    def check(self, block: _Block, id_column: str, rows: np.ndarray, has_row: np.ndarray) -> None:
        """Reject rows int64 [N] outside the table, unless not known, and rows set before."""
        block.require(
            ~has_row | ((rows >= 0) & (rows < self.num_rows)),
            id_column,
            lambda index: (
                f"id {block.ids[index]} is outside [0, {self.num_rows}), the rows of table "
                f"'{self.name}'; raise num_embeddings or drop the row"
            ),
        )
        is_local = (rows >= self._first) & (rows < self._first + len(self._is_set))
        indices = rows[is_local] - self._first
        is_new = np.zeros(len(indices), dtype=bool)
        is_new[np.unique(indices, return_index=True)[1]] = True
        is_good = ~is_local
        is_good[is_local] = is_new & ~self._is_set[indices]
        block.require(
            is_good,
            id_column,
            lambda index: (
                f"id {block.ids[index]}: row {rows[index]} of table '{self.name}' has a vector "
                "already; keep one per row"
            ),
        )
        self._is_set[indices] = True
