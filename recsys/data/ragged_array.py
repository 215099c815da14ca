"""Rows of varying length kept as one flat memory-mapped array plus offsets.

This is what item content becomes on disk: token ids, pixels, features or hidden states. Ranks and
loader processes of one machine share its pages, and a batch is gathered by one fancy index.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


class RaggedArray:
    """N rows; row n holds `lengths[n]` entries of one shape and type.

    On disk: `values.npy` [sum of lengths, ...] and `offsets.npy` [N + 1].
    """

    def __init__(self, folder: Path, writable: bool = False) -> None:
        self.values = np.load(folder / "values.npy", mmap_mode="r+" if writable else "r")
        self.offsets = np.load(folder / "offsets.npy")

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
        np.lib.format.open_memmap(folder / "values.npy", "w+", np.dtype(dtype), full_shape).flush()
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
