"""Stored features in a NumPy file, [items, W] or [items, T, W], beside the items' Parquet files.

Files of any size, local or at a URL, are read in pieces, front to back. A token of NaN alone is
missing, so an item can have fewer tokens than others, or none.

Shapes: n rows of a piece, R rows of the file, T tokens of a row, W values of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from recsys.data.filesystem import Location
from recsys.data.items.item_table import digest_of
from recsys.data.items.ragged_array import RowWriter

BYTES_PER_PIECE = 2**24
FLOATS = ("float16", "float32", "float64")

# Reports bad rows: (first row of a piece, bad bool [n], reason).
ReportRows = Callable[[int, np.ndarray, str], None]


class FeatureFile:
    """A .npy file with a row of features per item.

    Raises:
        ValueError: it is not such a file; names its properties and the expected ones.

    Example::

        FeatureFile(Location.of("shop/audio.npy")).width
    """

    def __init__(self, file: Location) -> None:
        """Read the header and check type and shape."""
        self.file = file
        try:
            with file.filesystem.open(file.path, "rb") as opened:
                shape, is_fortran, kind = _header(opened)
                self._start = opened.tell()
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file; schema.yaml names it") from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: not a readable .npy file ({error})") from error
        if kind.name not in FLOATS:
            raise ValueError(f"{file}: holds {kind}, expected one of {', '.join(FLOATS)}")
        if len(shape) not in (2, 3) or min(shape) < 1 or is_fortran:
            order = " in column order" if is_fortran else ""
            raise ValueError(
                f"{file}: has shape {list(shape)}{order}; save [items, values] or [items, tokens, "
                "values], by np.ascontiguousarray"
            )
        self.num_rows, self.width, self.kind = shape[0], shape[-1], kind
        self.row_shape = (shape[1] if len(shape) == 3 else 1, shape[-1])

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, values float32 [n, T, W]) from front to back.

        Raises:
            ValueError: the file ends too early.
        """
        row_bytes = int(np.prod(self.row_shape)) * self.kind.itemsize
        step = max(BYTES_PER_PIECE // row_bytes, 1)
        with self.file.filesystem.open(self.file.path, "rb") as opened:
            opened.seek(self._start)
            for first in range(0, self.num_rows, step):
                count = min(step, self.num_rows - first)
                content = opened.read(count * row_bytes)
                if len(content) < count * row_bytes:
                    raise ValueError(
                        f"{self.file}: ends before row {self.num_rows - 1}; write it again"
                    )
                values = np.frombuffer(content, self.kind).reshape(count, *self.row_shape)
                with np.errstate(over="ignore"):  # values beyond float32 are refused as infinite
                    yield first, values.astype(np.float32)

    def fingerprint(self) -> str:
        """Return a hash of the values."""
        return digest_of(self.num_rows, *(values.data.cast("B") for _, values in self.pieces()))


def read_ids(file: Location, num_rows: int) -> np.ndarray:  # [R]
    """Return the id of each row of a feature file, integers or strings.

    Raises:
        ValueError: it is no such file, or its length differs.
    """
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
    """Write the `RaggedArray` of a feature file and return its number of tokens.

    Raises:
        ValueError: raised by `report` for a row with a value that is not finite.
    """
    lengths = np.zeros(num_rows, np.int64)
    usable = np.ones(features.num_rows, bool)
    for first, values in features.pieces():
        there = ~np.isnan(values).all(axis=2)
        bad = (there & ~np.isfinite(values).all(axis=2)).any(axis=1)
        rows = places[first : first + len(values)]
        report(first, bad & (rows >= 0), "a feature with a value that is not finite")
        usable[first : first + len(values)] = ~bad & (rows >= 0)
        kept = usable[first : first + len(values)]
        lengths[rows[kept]] = there[kept].sum(axis=1)
    with closing(RowWriter(folder, lengths, (features.width,), "float32")) as writer:
        for first, values in features.pieces():
            kept = usable[first : first + len(values)]
            there = ~np.isnan(values).all(axis=2)
            writer.write(places[first : first + len(values)][kept], values[kept][there[kept]])
    return int(lengths.sum())


def _header(opened: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether in column order, and type from the header."""
    version = npy.read_magic(opened)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(opened)
