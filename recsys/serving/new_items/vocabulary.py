"""The exact map of a package's items, to which items are added."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary


class GrowingVocabulary(ExactVocabulary):
    """An exact map that takes ids beyond its table, which then have content alone.

    New ids get the free rows of the table, as `recsys prepare vocabulary` gives them. Where none is
    left they are numbered on after the table; a lookup of its vectors takes the last row, that of
    unknown ids.

    Args:
        known: the map of the run.
        added: ids that were added since.

    Raises:
        ValueError: an id is null or not of the map's type.

    Example::

        known = ExactVocabulary(num_embeddings=3)
        known.extend([pa.array(["ann"])])
        GrowingVocabulary(known, [pa.array(["bob", "eve"])]).rows_of(pa.array(["bob", "eve"]))
        # [1, 3]; row 2 is that of unknown ids
    """

    is_limited = False

    def __init__(self, known: ExactVocabulary, added: Iterable[pa.Array] = ()) -> None:
        """Take over the map and add the ids."""
        super().__init__(known.num_embeddings)
        self.extend([known.ids, *added])

    @property
    def num_items(self) -> int:
        """Number of rows of content: those of the table, and one per id beyond it."""
        return self.num_embeddings + max(0, len(self) - self.unknown_row)

    def find(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Return the rows of raw ids: int64 [N], -1 where the map does not know one."""
        rows = super().find(ids)
        return rows + (rows >= self.unknown_row)
