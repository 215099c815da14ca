"""Stores an unfinished cache: one file per encoder call, each complete or absent.

A file gets its name when it is complete, and ends with a checksum, so that neither a killed process
nor a power failure leaves a partial file that passes as complete. Files are named by the content of
their items: any job on any machine writes the same file for the same items, and no process writes
into another's file.

Shapes: n items of a call, D width of the output.
"""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from recsys.data.filesystem import whole_file
from recsys.data.items.item_table import digest_of

CHECKSUM_BYTES = 4


class Parts:
    """Folder of the files of finished calls.

    Example::

        parts = Parts(folder)
        name = parts.name_of(hashes[rows])
        if not parts.holds(name):
            parts.write(name, lengths, values)
    """

    def __init__(self, folder: Path) -> None:
        """Keep the folder; it need not exist yet."""
        self.folder = folder

    @staticmethod
    def name_of(hashes: np.ndarray) -> str:  # [n]
        """Return the name of a call, from the hashes of its items."""
        return digest_of(hashes.tobytes())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def holds(self, name: str) -> bool:
        """Return whether some process has finished this call."""
        return self._path(name).exists()

    def write(
        self,
        name: str,
        lengths: np.ndarray,  # [n], number of tokens of each item
        values: np.ndarray,  # [sum of lengths, D]
    ) -> None:
        """Save the outputs of one call."""
        buffer = BytesIO()
        np.save(buffer, lengths)
        np.save(buffer, values)
        content = buffer.getbuffer()
        with whole_file(self._path(name)) as partial, partial.open("wb") as file:
            file.write(content)
            file.write(_checksum(content))

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (lengths [n], values [sum of lengths, D]) of one call.

        Raises:
            ValueError: the file is damaged.
        """
        content = memoryview(self._path(name).read_bytes())
        kept = content[:-CHECKSUM_BYTES]
        if _checksum(kept) != content[-CHECKSUM_BYTES:]:
            raise ValueError(f"{self._path(name)}: damaged; remove it, it is made again")
        buffer = BytesIO(kept)
        return np.load(buffer, allow_pickle=False), np.load(buffer, allow_pickle=False)

    def read_lengths(self, name: str) -> np.ndarray:  # [n]
        """Return the lengths of one call, without a check for damage."""
        with open(self._path(name), "rb") as file:
            return np.load(file, allow_pickle=False)

    def remove_damaged(self, names: list[str]) -> list[str]:
        """Delete the damaged files among `names`, and return the names of the intact ones."""
        whole = []
        for name in names:
            if self.holds(name):
                try:
                    self.read(name)
                    whole.append(name)
                except ValueError:
                    self._path(name).unlink(missing_ok=True)
        return whole


def _checksum(content: memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")
