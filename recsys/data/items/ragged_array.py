"""Rows of varying length, stored as one flat memory-mapped array plus offsets.

Item content is stored on disk in this form: token ids, pixels, features or hidden states. Ranks and
threads of one machine share its pages, and one index operation gathers a batch. Pages that were
read count as memory of the process until they are released, which happens whenever about
`RESIDENT_BYTES` of a larger file may be mapped; the system's page cache still has them then.

Rows of equal content may share their entries: beside the entries of S distinct rows lies then the
number of the distinct row of each of the N rows.

Shapes: N rows of the array, S distinct rows, n rows written at once, U rows gathered, T entries of
the longest.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
from numpy.lib import format as npy

RESIDENT_BYTES = 2**30
MAPPED_AROUND = 2**16  # bytes that the kernel maps around each page read
SHARED = "distinct.npy"  # number of the distinct row of each row; -1 for a row without entries


class RaggedArray:
    """N rows; row n holds `lengths[n]` entries of one shape and type.

    On disk: `values.npy` [sum of lengths, ...] and `offsets.npy` [N + 1], or, of rows that share
    their entries, `offsets.npy` [S + 1] and `distinct.npy` [N] (`share_rows`).

    Raises:
        ValueError: the files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        """Map the values and read the offsets."""
        try:
            self.values = np.load(folder / "values.npy", "r", allow_pickle=False)
            self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            fits = self.offsets.dtype == np.int64 and self.offsets[-1] <= len(self.values)
            self.distinct: np.ndarray | None = None
            if (folder / SHARED).exists():
                self.distinct = np.load(folder / SHARED, allow_pickle=False)
                fits &= self.distinct.dtype == np.int64
                fits &= int(self.distinct.max(initial=-1)) < len(self.offsets) - 1
        except (OSError, ValueError, EOFError, IndexError, TypeError) as error:
            raise ValueError(f"{folder}: damaged ({error}); remove it, it is made again") from error
        if not fits:
            raise ValueError(f"{folder}: damaged (its files differ); remove it, it is made again")
        self.folder = folder
        # Slices of a memmap are slow to create; slices of a plain array are not.
        self._plain = np.asarray(self.values)
        self._mapped = 0  # upper bound in bytes

    def __reduce__(self) -> tuple[Callable[[Path], RaggedArray], tuple[Path]]:
        """Pickle only the folder: another process opens the files again."""
        return RaggedArray, (self.folder,)

    def __len__(self) -> int:
        """Return the number of rows, N."""
        return len(self.offsets) - 1 if self.distinct is None else len(self.distinct)

    @property
    def lengths(self) -> np.ndarray:
        """Number of entries of each row, [N]."""
        lengths = np.diff(self.offsets)
        if self.distinct is None:
            return lengths
        return np.where(self.distinct >= 0, lengths[self.distinct], 0)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [U]
        """Return padded rows (values [U, T, ...], mask bool [U, T]); T is at least 1.

        Row -1 stands for an item that the array lacks: it has no entry.
        """
        if self.distinct is not None:
            rows = np.where(rows >= 0, self.distinct[rows], -1)
        starts = self.offsets[rows]
        lengths = np.where(rows >= 0, self.offsets[rows + 1] - starts, 0)
        positions = np.arange(max(int(lengths.max(initial=0)), 1))
        mask = positions < lengths[:, None]
        # Padding reads entry 0 instead of branching; it is cleared so that it cannot pass for data.
        values = self._plain.take(np.where(mask, starts[:, None] + positions, 0), axis=0)
        if not mask.all():
            values[~mask] = 0
        self._mapped += values.nbytes + len(rows) * MAPPED_AROUND
        if self._mapped > RESIDENT_BYTES:
            cast(mmap.mmap, self.values.base).madvise(mmap.MADV_DONTNEED)  # release the pages
            self._mapped = 0
        return values, mask


class RaggedWriter:
    """Writes a `RaggedArray` chunk by chunk, with one chunk in memory.

    It uses write calls, not mapped pages: the file does not count as memory of the process, and a
    full disk raises an error instead of a signal that kills.

    Example::

        with closing(RaggedWriter(folder, (), "int64")) as writer:
            writer.add(np.array([2, 0, 1]), np.array([7, 8, 9]))  # [7, 8], [], [9]
        RaggedArray(folder).lengths  # [2, 0, 1]
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: str) -> None:
        """Open the file of values; `shape` and `dtype` are those of one entry."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shape, self.dtype = folder, shape, np.dtype(dtype)
        self.lengths: list[np.ndarray] = []
        self.num_entries = 0
        self._file = open(folder / "values.npy", "wb")  # noqa: SIM115 - until `close`
        self._write_header()

    def _write_header(self) -> None:
        """Write the header for the number of entries so far."""
        # numpy leaves room in the header for the number of entries to grow. It is 1 at least, since
        # an empty file cannot be mapped.
        shape = (max(self.num_entries, 1), *self.shape)
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)

    def add(
        self, lengths: np.ndarray, values: np.ndarray
    ) -> None:  # lengths [n], values [sum of lengths, ...]
        """Append rows of these lengths."""
        assert values.shape == (lengths.sum(), *self.shape)
        self.lengths.append(lengths)
        self.num_entries += len(values)
        self._file.write(np.ascontiguousarray(values, self.dtype).data)

    def close(self) -> None:
        """Complete the files and flush them to disk, safe from a loss of power."""
        if not self.num_entries:
            self._file.write(np.zeros(self.shape, self.dtype).tobytes())
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.concatenate([np.zeros(1, np.int64), *self.lengths])
        np.save(self.folder / "offsets.npy", np.cumsum(lengths).astype(np.int64))


class RowWriter(RaggedWriter):
    """Writes a `RaggedArray` of known lengths, with rows in any order.

    Example::

        with closing(RowWriter(folder, np.array([1, 0, 2]), (4,), "float32")) as writer:
            writer.write(np.array([2, 0]), values)  # [3, 4]: first the two entries of row 2
    """

    def __init__(
        self,
        folder: Path,
        lengths: np.ndarray,  # [N]
        shape: tuple[int, ...],
        dtype: str,
    ) -> None:
        """Reserve the file for rows of these lengths."""
        super().__init__(folder, shape, dtype)
        self.lengths, self.num_entries = [lengths], int(lengths.sum())
        self._starts = np.cumsum(lengths) - lengths
        self._first_byte = self._file.tell()
        self._entry_bytes = self.dtype.itemsize * math.prod(shape)
        self._file.truncate(self._first_byte + self.num_entries * self._entry_bytes)

    def write(
        self, rows: np.ndarray, values: np.ndarray
    ) -> None:  # rows [n], values [sum of their lengths, ...]
        """Write all entries of some rows."""
        place = 0
        for row in rows.tolist():
            entries = values[place : place + self.lengths[0][row]]
            self._file.seek(self._first_byte + int(self._starts[row]) * self._entry_bytes)
            self._file.write(np.ascontiguousarray(entries, self.dtype).data)
            place += len(entries)
        assert place == len(values)


def share_rows(folder: Path, distinct: np.ndarray) -> None:  # distinct [N], in [-1, S)
    """Turn the array of S distinct rows in `folder` into one of N rows that share their entries.

    The array is closed and not in use yet; -1 in `distinct` stands for a row without entries.
    """
    with open(folder / SHARED, "wb") as file:
        np.save(file, distinct.astype(np.int64))
        file.flush()
        os.fsync(file.fileno())
