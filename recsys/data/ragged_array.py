"""Rows of varying length kept as one flat memory-mapped array plus offsets.

This is what item content becomes on disk: token ids, pixels, features or hidden states. Ranks and
loader processes of one machine share its pages, and a batch is gathered by one fancy index.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.lib import format as npy


class RaggedArray:
    """N rows; row n holds `lengths[n]` entries of one shape and type.

    On disk: `values.npy` [sum of lengths, ...] and `offsets.npy` [N + 1].

    Raises:
        ValueError: the files are damaged.
    """

    def __init__(self, folder: Path, writable: bool = False) -> None:
        try:
            self.values = np.load(
                folder / "values.npy", "r+" if writable else "r", allow_pickle=False
            )
            self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            fits = self.offsets.dtype == np.int64 and self.offsets[-1] <= len(self.values)
        except (OSError, ValueError, EOFError, IndexError, TypeError) as error:
            raise ValueError(f"{folder}: damaged ({error}); remove it, it is made again") from error
        if not fits:
            raise ValueError(f"{folder}: damaged (its files differ); remove it, it is made again")

    @staticmethod
    def create(
        folder: Path, lengths: np.ndarray, shape: tuple[int, ...], dtype: str
    ) -> RaggedArray:
        """An array of zeros to be filled through `values` and flushed."""
        folder.mkdir(parents=True, exist_ok=True)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        np.save(folder / "offsets.npy", offsets)
        # One entry at least, since an empty file cannot be mapped.
        full_shape = (max(int(offsets[-1]), 1), *shape)
        npy.open_memmap(folder / "values.npy", "w+", np.dtype(dtype), full_shape).flush()
        return RaggedArray(folder, writable=True)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Padded rows: (values [U, T, ...], mask [U, T]), T the longest of them, at least 1.

        A row of -1 stands for an item that is not in the array: it has no entry.
        """
        starts = self.offsets[rows]
        lengths = np.where(rows >= 0, self.offsets[rows + 1] - starts, 0)
        positions = np.arange(max(int(lengths.max(initial=0)), 1))
        mask = positions[None, :] < lengths[:, None]
        # Padding reads entry 0 instead of branching; it is cleared so that it cannot pass for data.
        index = np.where(mask, starts[:, None] + positions[None, :], 0)
        values = self.values[index]
        values[~mask] = 0
        return values, mask


class RaggedWriter:
    """Writes a `RaggedArray` whose rows come one chunk after the other, holding one in memory.

    Example::

        with closing(RaggedWriter(folder, (), "int64")) as writer:
            writer.add(np.array([2, 0, 1]), np.array([7, 8, 9]))  # [7, 8], [], [9]
        RaggedArray(folder).lengths  # [2, 0, 1]
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shape, self.dtype = folder, shape, np.dtype(dtype)
        self.lengths: list[np.ndarray] = []
        self.num_entries = 0
        self._file = open(folder / "values.npy", "wb")  # noqa: SIM115 - until `close`
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in it for the number of entries to grow.
        shape = (max(self.num_entries, 1), *self.shape)
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)

    def add(
        self,
        lengths: np.ndarray,  # [n] of the next rows
        values: np.ndarray,  # [sum of lengths, ...]
    ) -> None:
        """Appends rows."""
        assert values.shape == (lengths.sum(), *self.shape)
        self.lengths.append(lengths)
        self.num_entries += len(values)
        self._file.write(np.ascontiguousarray(values, self.dtype).data)

    def close(self) -> None:
        """Completes the files."""
        if not self.num_entries:  # an empty file cannot be mapped
            self._file.write(np.zeros(self.shape, self.dtype).tobytes())
        self._file.seek(0)
        self._write_header()
        self._file.close()
        lengths = np.concatenate([np.zeros(1, np.int64), *self.lengths])
        np.save(self.folder / "offsets.npy", np.cumsum(lengths).astype(np.int64))
