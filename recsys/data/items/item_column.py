"""One column of the items: its chunks, or the .npy file that schema.yaml names in its place.

A file [items, W] or [items, T, W] is read in pieces. A token of NaN alone is missing.
Shapes: n rows of a piece, R rows of the file, T tokens of a row, W values of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from recsys.data.items.item_table import ItemTable, digest_of
from recsys.data.items.ragged_array import RowWriter
from recsys.data.parquet.bad_rows import Report
from recsys.storage.location import Location

BYTES_PER_PIECE = 2**24
FLOATS = ("float16", "float32", "float64")

# Reports bad rows: (first row of a piece, bad bool [n], reason).
ReportRows = Callable[[int, np.ndarray, str], None]


class FeatureFile:
    """A .npy file with a row of features per item; another file is a ValueError."""

    def __init__(self, file: Location) -> None:
        self.file = file
        try:
            with file.filesystem.open(file.path, "rb") as stream:
                version = npy.read_magic(stream)
                is_first = version == (1, 0)
                read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
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

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, values float32 [n, T, W]) from front to back."""
        row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        step = max(BYTES_PER_PIECE // row_bytes, 1)
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
        return digest_of(self.num_rows, *(values.data.cast("B") for _, values in self.pieces()))


def _read_ids(file: Location, num_rows: int) -> np.ndarray:  # [R]
    try:
        ids = np.load(BytesIO(file.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; schema.yaml names it") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: not a readable .npy file ({error})") from error
    if ids.shape != (num_rows,) or ids.dtype.kind not in "iuU":
        raise ValueError(
            f"{file}: has shape {list(ids.shape)} of {ids.dtype}; save the ids of the {num_rows} "
            "rows of features, integers or strings"
        )
    return ids


def write_rows(
    folder: Path, features: FeatureFile, places: np.ndarray, num_rows: int, report: ReportRows
) -> int:  # places [R], row of the array for each row, -1: left out
    """Write the `RaggedArray` of a feature file and return its number of tokens."""
    lengths = np.zeros(num_rows, np.int64)
    usable = np.ones(features.num_rows, bool)
    for first, values in features.pieces():
        piece = slice(first, first + len(values))
        is_token = ~np.isnan(values).all(axis=2)
        bad = (is_token & ~np.isfinite(values).all(axis=2)).any(axis=1)
        rows = places[piece]
        report(first, bad & (rows >= 0), "a feature with a value that is not finite")
        usable[piece] = ~bad & (rows >= 0)
        lengths[rows[usable[piece]]] = is_token[usable[piece]].sum(axis=1)
    with closing(RowWriter(folder, lengths, (features.width,), "float32")) as writer:
        for first, values in features.pieces():
            piece = slice(first, first + len(values))
            values = values[usable[piece]]
            writer.write(places[piece][usable[piece]], values[~np.isnan(values).all(axis=2)])
    return int(lengths.sum())


class ItemColumnReader:
    """Reads one column, which schema.yaml names, of the items' files."""

    def __init__(self, table: ItemTable, name: str) -> None:
        self.table, self.name, self.settings = table, name, table.items.columns[name]

    @property
    def skips_bad_rows(self) -> bool:
        return self.table.bad_rows.on_bad_row == "skip"

    def chunks(self) -> Iterator[tuple[pa.Array, str, Report]]:
        """Yield (values, file and column for messages, report of bad rows) for each chunk."""
        for file, first_row, chunk in self.table.chunks(self.name):
            report = partial(self.table.bad_rows.add, file, self.name, first_row)
            yield chunk, f"{file}: column '{self.name}'", report

    def feature_file(self) -> tuple[FeatureFile, np.ndarray | None] | None:
        """Return the .npy file that replaces the column, and its rows' ids; None without one."""
        if self.settings.file is None:
            return None
        features, ids = FeatureFile(self.table.root / self.settings.file), self.settings.ids
        if ids is None:
            return features, None
        return features, _read_ids(self.table.root / ids, features.num_rows)

    def places_of(self, features: FeatureFile, ids: np.ndarray | None) -> np.ndarray:  # [R]
        """Return the item's row for each row of a feature file, -1 for none."""
        if ids is not None:
            return self.table.places_of(ids, self.table.root / str(self.settings.ids))
        if features.num_rows != self.table.num_rows:
            raise ValueError(
                f"{features.file}: has {features.num_rows} rows, the items' files "
                f"{self.table.num_rows}; write one row per item in their order, or name a .npy "
                f"file of its ids in schema.yaml: items.columns.{self.name}.ids"
            )
        return np.arange(features.num_rows)

    def report_file(self, first_row: int, bad: np.ndarray, reason: str) -> None:  # bad [n], bool
        """Report bad rows of the feature file, for `write_rows`."""
        message = f"{reason}; write NaN throughout for a missing token or item"
        file = self.table.root / str(self.settings.file)
        self.table.bad_rows.add(file, self.name, first_row, bad, reason, lambda row: message)

    def fingerprint(self) -> str:
        """Return a hash of the content and of the ids it belongs to."""
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
