"""Parquet files of pretrained vectors, streamed and checked.

Anything that would put a wrong number into a table is an error with file, column and row, raised
before the table changes. The scanner of pyarrow.dataset is not used: it loses the position of
filtered rows in their file, and it holds whole row groups (417 MiB of memory for one of 122 MiB;
this module needs 178 MiB).
Shapes: N rows of one block of a file, D dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

BLOCK_BYTES = 2**24  # vectors decoded at a time
READ_BYTES = 2**20  # read at a time, as a row group may be a whole file
TABLE_COLUMN = "table"

# Ids as stored in a file -> rows of the table, int64 [N]; -1 leaves an id out.
RowsOfIds = Callable[[pa.Array], np.ndarray]


@dataclass(frozen=True)
class PretrainedFiles:
    """Parquet files with one vector per id, each id once in all files together.

    The id column holds integers, the vector column lists of floats. If a file has a column
    ``table``, like an export of several tables, only the rows of one table are read; row groups
    of other tables are skipped by their statistics.

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
        """Build the error for the id at ``index``, with file, column and row."""
        return _error(self.file, self.id_column, self.positions[index], fault)

    def rows(self, rows_of_ids: RowsOfIds | None) -> np.ndarray:
        """Return the rows of the ids, int64 [N]: from ``rows_of_ids``, or the ids themselves.

        Unsigned ids beyond the range of int64 become negative.

        Raises:
            ValueError: the function refuses the ids, or without a function they are not integers.
        """
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


def read_pretrained(files: PretrainedFiles, table: str, dim: int) -> Iterator[PretrainedBlock]:
    """Yield the rows of ``table`` from all files, block by block.

    Raises:
        ValueError: a file that is missing or not Parquet, a column that is missing or of another
            type or width, a null, or a number that is not finite in float32.
    """
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
                fault = "null; fill it or drop the row"
                raise _error(path, column, positions[index], fault)
        vectors = _floats(lists)
        if (found := _bad_vector(lists, vectors, dim)) is not None:
            raise _error(path, files.vector_column, positions[found[0]], found[1])
        yield PretrainedBlock(path, id_column, ids, vectors.reshape(-1, dim), positions)


def _batches(
    file: pq.ParquetFile, columns: list[str], table: str, height: int
) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """Yield the columns of the rows of ``table``, with their positions [N] in the file."""
    first_row = 0
    for index in range(file.num_row_groups):
        row_group = file.metadata.row_group(index)
        position = first_row
        first_row += row_group.num_rows
        if TABLE_COLUMN in columns and not _may_hold(row_group, table):
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
    """Return the index of the first of N lists that cannot be used, and the reason.

    `numbers` are all numbers of the lists, float32 [N * D].
    """
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


def _floats(lists: pa.Array) -> np.ndarray:
    """Return all numbers of the lists, one list after the other: float32 [N * D]."""
    return lists.flatten().cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)


def _error(file: str, column: str, row: int, fault: str) -> ValueError:
    return ValueError(f"{file}: column '{column}', row {row}: {fault}")
