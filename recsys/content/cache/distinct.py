"""Distinct contents of a catalogue: each is encoded and stored once, however many items share it.

Genres, categories and placeholder pictures repeat: 12,930 items of one catalogue have 1,045 genre
strings. The output of an encoder's frozen part depends on the content alone
(`recsys.content.encoders.frozen_groups`), so sharing it changes no bit.

Shapes: N rows of an array, S distinct contents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DistinctRows:
    """Rows of an array by their content.

    first: int64 [S], ascending, the first row of each content.
    number: int64 [N], the place of each row's content in `first`; -1 for a row without content.

    Example::

        import numpy as np
        from recsys.content.cache.distinct import DistinctRows

        rows = DistinctRows.of(np.array([b"x", b"", b"y", b"x"], "S16"))
        rows.first, rows.number  # [0, 2], [0, -1, 1, 0]
    """

    first: np.ndarray
    number: np.ndarray

    @staticmethod
    def of(hashes: np.ndarray) -> DistinctRows:  # [N], empty for a row without content
        """Compare the rows by the hashes of their content."""
        rows = np.flatnonzero(hashes != b"")
        _, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        number = np.full(len(hashes), -1)
        number[rows] = place[group.reshape(-1)]
        return DistinctRows(rows[first[order]], number)

    @property
    def num_rows(self) -> int:
        """Number of rows with content."""
        return int((self.number >= 0).sum())

    @property
    def repeat(self) -> bool:
        """Whether a content occurs in more than one row."""
        return len(self.first) < self.num_rows

    @property
    def places(self) -> np.ndarray:  # int64 [N]
        """Return where each row is stored: with its equals, or in its own place if none repeats."""
        return self.number if self.repeat else np.arange(len(self.number))

    def describe(self, count: int) -> str:
        """Return `count` of the contents in words."""
        items = f"{count:,} items"
        return f"{count:,} distinct contents of {self.num_rows:,} items" if self.repeat else items
