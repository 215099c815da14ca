"""Rows of varying length, stored as one flat memory-mapped array plus offsets.

Mapped pages are released whenever about `RESIDENT_BYTES` may be resident. Shapes: N rows of the
array, S distinct rows, n rows written or hashed at once, U gathered rows, T entries of the longest.
"""

import hashlib
import math
import mmap
from pathlib import Path
from typing import cast

import numpy as np
from numpy.lib import format as npy

from recsys.storage.files import atomic_file, flush

RESIDENT_BYTES = 2**30
MAPPED_AROUND = 2**16  # bytes that the operating system maps around each page that is read
SHARED = "distinct.npy"  # file with the distinct row of each row; -1 for a row without entries
HASHES = "hashes.npy"  # file with a hash of each row's content
HASH_TYPE = "S16"  # empty for an item without content
ROWS_PER_HASHING = 256


class RaggedArray:
    """N rows; row n has `lengths[n]` entries of one shape and type.

    On disk: `values.npy` [sum of lengths, ...] and `offsets.npy` [N + 1]. With shared rows:
    `offsets.npy` [S + 1] and `distinct.npy` [N]. Damaged files are a ValueError.
    """

    def __init__(self, folder: Path) -> None:
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
        # Slicing a memmap is slow; slicing a plain array is not.
        self._plain = np.asarray(self.values)
        self._mapped = 0  # upper bound of resident bytes

    def __len__(self) -> int:
        return len(self.offsets) - 1 if self.distinct is None else len(self.distinct)

    @property
    def lengths(self) -> np.ndarray:  # of each row, [N]
        lengths = np.diff(self.offsets)
        return lengths if self.distinct is None else np.append(lengths, 0)[self.distinct]

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [U]
        """Return padded rows (values [U, T, ...], mask bool [U, T], T > 0); row -1 is empty."""
        if self.distinct is not None:
            rows = np.where(rows >= 0, self.distinct[rows], -1)
        starts = self.offsets[rows]
        lengths = np.where(rows >= 0, self.offsets[rows + 1] - starts, 0)
        positions = np.arange(max(int(lengths.max(initial=0)), 1))
        mask = positions < lengths[:, None]
        # Padding reads entry 0 instead of branching, and is set to 0 afterwards.
        values = self._plain.take(np.where(mask, starts[:, None] + positions, 0), axis=0)
        if not mask.all():
            values[~mask] = 0
        self._mapped += values.nbytes + len(rows) * MAPPED_AROUND
        if self._mapped > RESIDENT_BYTES:
            cast(mmap.mmap, self.values.base).madvise(mmap.MADV_DONTNEED)  # release the pages
            self._mapped = 0
        return values, mask


class RaggedWriter:
    """Writes a `RaggedArray` chunk by chunk; `shape` and `dtype` are those of one entry."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shape, self.dtype = folder, shape, np.dtype(dtype)
        self.lengths: list[np.ndarray] = []
        self.num_entries = 0
        self._file = open(folder / "values.npy", "wb")  # noqa: SIM115 - until `close`
        self._write_header()

    def _write_header(self) -> None:
        # The header has room for the final number of entries. An empty file cannot be mapped.
        shape = (max(self.num_entries, 1), *self.shape)
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)

    def add(self, lengths: np.ndarray, values: np.ndarray) -> None:  # [n], [sum of them, ...]
        assert values.shape == (lengths.sum(), *self.shape)
        self.lengths.append(lengths)
        self.num_entries += len(values)
        self._file.write(np.ascontiguousarray(values, self.dtype).data)

    def close(self) -> None:
        """Complete the files and flush the values to disk."""
        if not self.num_entries:
            self._file.write(np.zeros(self.shape, self.dtype).tobytes())
        self._file.seek(0)
        self._write_header()
        self._file.close()
        flush(self.folder / "values.npy")
        lengths = np.concatenate([np.zeros(1, np.int64), *self.lengths])
        np.save(self.folder / "offsets.npy", np.cumsum(lengths).astype(np.int64))


class RowWriter(RaggedWriter):
    """Writes a `RaggedArray` of known lengths [N], with rows in any order."""

    def __init__(
        self, folder: Path, lengths: np.ndarray, shape: tuple[int, ...], dtype: str
    ) -> None:
        super().__init__(folder, shape, dtype)
        self.lengths, self.num_entries = [lengths], int(lengths.sum())
        self._starts = np.cumsum(lengths) - lengths
        self._first_byte = self._file.tell()
        self._entry_bytes = self.dtype.itemsize * math.prod(shape)
        self._file.truncate(self._first_byte + self.num_entries * self._entry_bytes)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:  # [n], [their entries, ...]
        start = 0
        for row in rows.tolist():
            entries = values[start : start + self.lengths[0][row]]
            self._file.seek(self._first_byte + int(self._starts[row]) * self._entry_bytes)
            self._file.write(np.ascontiguousarray(entries, self.dtype).data)
            start += len(entries)
        assert start == len(values)


def share_rows(folder: Path, distinct: np.ndarray) -> None:  # distinct [N], in [-1, S)
    """Turn the S rows in `folder` into N rows; row n has the entries of `distinct[n]`, -1: none."""
    np.save(folder / SHARED, distinct.astype(np.int64))
    flush(folder / SHARED)


def stored_hashes(folder: Path) -> np.ndarray:  # [N], memory-mapped
    """Return the hashes of all rows of the array in `folder`; the first call computes the file."""
    path = folder / HASHES
    if not path.exists():
        array = RaggedArray(folder)
        hashes, filled = np.zeros(len(array), HASH_TYPE), np.flatnonzero(array.lengths > 0)
        for rows in np.split(filled, range(ROWS_PER_HASHING, len(filled), ROWS_PER_HASHING)):
            for row, entries, is_entry in zip(rows, *array.gather(rows), strict=True):
                hashes[row] = hashlib.blake2b(entries[is_entry].tobytes(), digest_size=16).digest()
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.save(file, hashes)
    return np.load(path, "r", allow_pickle=False)
