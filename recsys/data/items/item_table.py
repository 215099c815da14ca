"""Parquet files of the items: one row per item; ids are checked, columns read in chunks.

A column may be a .npy file instead, [items, W] or [items, T, W]. A token of only NaN is missing.
Shapes: N usable items, R rows of all files, n rows of a chunk or piece, T tokens of a row, W values
of a token.
"""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from embeddings.vocabulary.fixed import ExactVocabulary, integer_ids, is_id_type
from recsys.data.items.ragged_array import RowWriter
from recsys.data.parquet.bad_rows import BadRows, OnBadRow, Report
from recsys.data.parquet.file import READ_ERRORS, column_type, open_parquet, rows_digest
from recsys.data.parquet.values import without_views
from recsys.data.schema import Schema, advice_on_unknown
from recsys.storage.location import Location, errors_at
from recsys.storage.manifest import digest_of as digest_of

ROWS_PER_CHUNK = 256  # items in memory at once, as the encoded images of all items would not fit

Chunk = tuple[Location, int, pa.Array]  # file, first row in the file, values


class ItemTable:
    """Parquet files of the items at `folder`, by default `items` of the dataset: one row per item.

    Ids must map to rows below `num_items`. `on_bad_row` applies to null, repeated and unknown ids.
    For usable items, `ids` [N] are rows of the target item's table, or raw bounded ids, and `rows`
    [N] are positions among the R rows of all files.
    """

    def __init__(
        self,
        root: Location,
        schema: Schema,
        on_bad_row: OnBadRow = "error",
        folder: Location | None = None,
        num_items: int | None = None,
    ) -> None:
        if schema.items is None:
            raise ValueError(
                f"{root}/schema.yaml: a model with content needs `items` with their columns; add "
                "them or set `content: none`"
            )
        self.root, self.schema, self.items = root, schema, schema.items
        self.folder = folder or root / "items"
        self.num_items = num_items or schema.num_items
        self.files = self.folder.files(".parquet")
        if not self.files:
            raise ValueError(f"{self.folder}: no *.parquet files; write one row per item there")
        self.bad_rows = BadRows(on_bad_row)
        self._footers: dict[Location, str] = {}  # hashes that detect a replaced file
        self._read_ids()

    def _read_ids(self) -> None:
        ids, rows, chunks, position = [], [], [], 0
        for file, first_row, chunk in self.chunks(self.items.id):
            table_rows = self._rows_of_ids(file, chunk)
            usable = self._usable_rows(file, first_row, chunk, table_rows)
            ids.append(table_rows[usable].astype(np.int64))
            rows.append(position + usable)
            chunks.append((file, first_row, position))
            position += len(chunk)
        if not position:
            raise ValueError(f"{self.folder}: its files have no rows; write one row per item")
        self.ids, self.rows, self.num_rows = np.concatenate(ids), np.concatenate(rows), position
        if not len(self.ids):
            raise ValueError(f"{self.folder}: no id in column '{self.items.id}' can be used")
        self._leave_out_repeated(chunks)

    def _rows_of_ids(self, file: Location, chunk: pa.Array) -> np.ndarray:  # [n] -> int64 [n]
        """Return each id's row, -1 if unknown, arbitrary for null; bounded ids stay raw."""
        name, target = self.items.id, self.schema.target_item
        is_raw = self.schema.vocabulary_of(target) is not None
        if not (is_id_type(chunk.type) if is_raw else pa.types.is_integer(chunk.type)):
            expected = "integer or string" if is_raw else "integer"
            raise ValueError(
                f"{file}: column '{name}' has type {chunk.type}, expected {expected}; write it so"
            )
        if not is_raw:
            # Keep the type of the file, since a cast makes large unsigned ids negative.
            return chunk.fill_null(0).to_numpy(zero_copy_only=False)
        self.schema.require_id_type(name, chunk.type, str(file), target)
        vocabulary = self.schema.vocabularies.get(target)
        find = integer_ids if vocabulary is None else vocabulary.rows_of
        if isinstance(vocabulary, ExactVocabulary):
            find = vocabulary.find
        rows = np.zeros(len(chunk), np.int64)
        with errors_at(f"{file}: column '{name}'"):
            rows[chunk.is_valid().to_numpy(zero_copy_only=False)] = find(chunk.drop_null()).ravel()
        return rows

    def _usable_rows(
        self, file: Location, first_row: int, chunk: pa.Array, table_rows: np.ndarray
    ) -> np.ndarray:  # chunk [n], table_rows [n], of the target item -> at most [n]
        """Report null and unknown ids; return the positions of usable ids in the chunk."""
        limit, target = self.num_items, self.schema.target_item
        null = chunk.is_null().to_numpy(zero_copy_only=False)
        outside = ~null & ((table_rows < 0) | (table_rows >= limit))
        if self.schema.has_bounded_items:
            outside[:] = False
        report = partial(self.bad_rows.add, file, self.items.id, first_row)
        report(null, "null", lambda row: "null; every item needs an id")
        if self.schema.vocabulary_of(target) is None:
            problem = f"outside [0, {limit})"
            fix = f"raise num_embeddings of '{target}' in schema.yaml or remove the item"
        else:
            problem, fix = f"not in the vocabulary of '{target}'", "remove the item"
            if isinstance(self.schema.vocabularies.get(target), ExactVocabulary):
                fix = f"{advice_on_unknown(self.schema, target, self.root)}, or {fix}"
        report(outside, f"id {problem}", lambda row: f"id {chunk[row].as_py()} is {problem}; {fix}")
        return np.flatnonzero(~null & ~outside)

    def _leave_out_repeated(self, chunks: list[tuple[Location, int, int]]) -> None:
        """Report all but the first row of each item; chunks: (file, first row, first position)."""
        again = np.ones(len(self.ids), bool)
        again[np.unique(self.ids, return_index=True)[1]] = False
        repeated = np.full(self.num_rows, -1)
        repeated[self.rows[again]] = self.ids[again]
        stops = [position for _, _, position in chunks[1:]]
        vocabulary = self.schema.vocabulary_of(self.schema.target_item)
        item = "item {}" if vocabulary is None else "this item"
        message = f"{item} has a row already; keep one row per item"
        if vocabulary is not None and vocabulary.kind == "hash":
            message = (
                "another item has this item's hash, and content is kept by hash; choose a "
                "vocabulary of kind exact, or raise num_embeddings"
            )

        def second_row(ids: np.ndarray, row: int) -> str:
            return message.format(ids[row])

        for (file, first_row, _), ids in zip(chunks, np.split(repeated, stops), strict=True):
            report = partial(self.bad_rows.add, file, self.items.id, first_row)
            report(ids >= 0, "a second row of an item", partial(second_row, ids))
        self.ids, self.rows = self.ids[~again], self.rows[~again]

    def chunks(self, name: str) -> Iterator[Chunk]:
        """Yield a column in chunks of `ROWS_PER_CHUNK` values; a damaged file is a ValueError."""
        for file in self.files:
            with open_parquet(file, streaming=True) as parquet:
                column_type(parquet, file, name)
                footer = rows_digest(file, parquet)
                if self._footers.setdefault(file, footer) != footer:
                    raise ValueError(
                        f"{file}: was replaced after the job had opened it; start again"
                    )
                row = 0
                try:
                    for batch in parquet.iter_batches(ROWS_PER_CHUNK, columns=[name]):
                        yield file, row, plain_values(batch.column(name))
                        row += batch.num_rows
                except READ_ERRORS as error:
                    raise ValueError(
                        f"{file}: column '{name}' cannot be read from row {row} on ({error}); "
                        "write the file again"
                    ) from error
                if row != parquet.metadata.num_rows:
                    raise ValueError(
                        f"{file}: column '{name}' has {row} values for {parquet.metadata.num_rows} "
                        "rows; write the file again"
                    )

    def positions_of(self, ids: np.ndarray, file: Location) -> np.ndarray:  # [n] -> [n]
        """Return each id's position among the rows of all item files, or -1; `file` has the ids."""
        table_rows = self._rows_of_ids(file, pa.array(ids))
        order = np.argsort(self.ids)
        at = np.searchsorted(self.ids[order], table_rows).clip(max=len(order) - 1)
        has_item = self.ids[order][at] == table_rows
        items, counts = np.unique(table_rows[has_item], return_counts=True)
        if (counts > 1).any():
            twice = ids[table_rows == items[counts > 1][0]][0]
            raise ValueError(f"{file}: id {twice} has two rows; keep one row per item")
        return np.where(has_item, self.rows[order][at], -1)

    def fingerprint(self, name: str) -> str:
        """Return a hash of a column's content and of the items' ids."""
        buffers: list[Any] = [self.ids.tobytes(), self.rows.tobytes()]
        for _, _, chunk in self.chunks(name):
            # A slice shares the buffers of its parent, so hash a compact copy.
            compact = pa.concat_arrays([chunk])
            views = [memoryview(buffer) for buffer in compact.buffers() if buffer]
            buffers += [len(compact), str(compact.type), *views]
        return digest_of(*buffers)


def plain_values(values: pa.Array) -> pa.Array:
    """Return values in a type without dictionary encoding and without Arrow's views."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return without_views(values)


BYTES_PER_BLOCK = 2**24
FLOATS = ("float16", "float32", "float64")


class FeatureFile:
    """A .npy file with a row of features per item; another file is a ValueError."""

    def __init__(self, file: Location) -> None:
        self.file = file
        try:
            with file.filesystem.open(file.path, "rb") as stream:
                is_version_1 = npy.read_magic(stream) == (1, 0)
                read = npy.read_array_header_1_0 if is_version_1 else npy.read_array_header_2_0
                shape, is_fortran, dtype = read(stream)
                self._start = stream.tell()
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file; schema.yaml names it") from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: not a readable .npy file ({error})") from error
        if dtype.name not in FLOATS:
            raise ValueError(f"{file}: holds {dtype}, expected one of {', '.join(FLOATS)}")
        if len(shape) not in (2, 3) or min(shape) < 1 or is_fortran:
            order = " in column order" if is_fortran else ""
            raise ValueError(
                f"{file}: has shape {list(shape)}{order}; save [items, values] or [items, tokens, "
                "values], by np.ascontiguousarray"
            )
        self.num_rows, self.width, self.dtype = shape[0], shape[-1], dtype
        self.row_shape = (shape[1] if len(shape) == 3 else 1, shape[-1])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield consecutive blocks as (first row, values float32 [n, T, W])."""
        row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        step = max(BYTES_PER_BLOCK // row_bytes, 1)
        with self.file.filesystem.open(self.file.path, "rb") as stream:
            stream.seek(self._start)
            for first in range(0, self.num_rows, step):
                count = min(step, self.num_rows - first)
                content = stream.read(count * row_bytes)
                if len(content) < count * row_bytes:
                    raise ValueError(
                        f"{self.file}: ends before row {self.num_rows - 1}; write it again"
                    )
                values = np.frombuffer(content, self.dtype).reshape(count, *self.row_shape)
                with np.errstate(over="ignore"):  # values beyond float32 are refused as infinite
                    yield first, values.astype(np.float32)

    def fingerprint(self) -> str:
        shape = self.num_rows, *self.row_shape
        return digest_of(shape, *(values.data.cast("B") for _, values in self.blocks()))


def _read_ids(file: Location, features: FeatureFile) -> np.ndarray:  # [R]
    try:
        ids = np.load(BytesIO(file.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; schema.yaml names it") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: not a readable .npy file ({error})") from error
    if ids.shape != (features.num_rows,) or ids.dtype.kind not in "iuU":
        raise ValueError(
            f"{file}: has shape {list(ids.shape)} of {ids.dtype}; save the ids of the "
            f"{features.num_rows} rows of features, integers or strings"
        )
    return ids


class ItemColumnReader:
    """Reads one item column of `schema.yaml` from the items' files."""

    def __init__(self, table: ItemTable, name: str) -> None:
        self.table, self.name, self.settings = table, name, table.items.columns[name]

    @property
    def skips_bad_rows(self) -> bool:
        return self.table.bad_rows.on_bad_row == "skip"

    def chunks(self) -> Iterator[tuple[pa.Array, str, Report]]:
        """Yield (values, file and column for messages, function that reports bad rows) by chunk."""
        for file, first_row, chunk in self.table.chunks(self.name):
            report = partial(self.table.bad_rows.add, file, self.name, first_row)
            yield chunk, f"{file}: column '{self.name}'", report

    def feature_file(self) -> tuple[FeatureFile, np.ndarray | None] | None:
        """Return the .npy file that replaces the column, and its rows' ids; None without one."""
        if self.settings.file is None:
            return None
        features, ids = FeatureFile(self.table.root / self.settings.file), self.settings.ids
        return features, None if ids is None else _read_ids(self.table.root / ids, features)

    def write_features(self, folder: Path, features: FeatureFile, ids: np.ndarray | None) -> int:
        """Write the `RaggedArray` of the feature file and return its number of tokens."""
        reason = "a feature with a value that is not finite"
        message = f"{reason}; write NaN throughout for a missing token or item"
        report = partial(self.table.bad_rows.add, features.file, self.name)
        rows, lengths = self._rows_of(features, ids), np.zeros(self.table.num_rows, np.int64)
        for first, values in features.blocks():
            item_rows = rows[first : first + len(values)]  # a view, so that -1 is stored in `rows`
            is_token = ~np.isnan(values).all(axis=2)
            bad = (is_token & ~np.isfinite(values).all(axis=2)).any(axis=1) & (item_rows >= 0)
            report(first, bad, reason, lambda row: message)
            item_rows[bad] = -1
            lengths[item_rows[item_rows >= 0]] = is_token[item_rows >= 0].sum(axis=1)
        with closing(RowWriter(folder, lengths, (features.width,), "float32")) as writer:
            for first, values in features.blocks():
                item_rows = rows[first : first + len(values)]
                values = values[item_rows >= 0]
                writer.write(item_rows[item_rows >= 0], values[~np.isnan(values).all(axis=2)])
        return int(lengths.sum())

    def _rows_of(self, features: FeatureFile, ids: np.ndarray | None) -> np.ndarray:  # [R]
        """Return the item row of each row of a feature file, or -1."""
        if ids is not None:
            return self.table.positions_of(ids, self.table.root / str(self.settings.ids))
        if features.num_rows != self.table.num_rows:
            raise ValueError(
                f"{features.file}: has {features.num_rows} rows, the items' files "
                f"{self.table.num_rows}; write one row per item in their order, or name a .npy "
                f"file of its ids in schema.yaml: items.columns.{self.name}.ids"
            )
        return np.arange(features.num_rows)

    def fingerprint(self) -> str:
        if (feature_file := self.feature_file()) is None:
            return self.table.fingerprint(self.name)
        features, ids = feature_file
        by_row = [] if ids is None else [str(ids.dtype), ids.tobytes()]
        rows = [self.table.ids.tobytes(), self.table.rows.tobytes()]
        return digest_of(features.fingerprint(), *by_row, *rows)

    def empty(self) -> ValueError:
        return ValueError(
            f"{self.table.folder}: column '{self.name}' is null or empty in every row; write the "
            "content or take the modality out of the configuration"
        )
