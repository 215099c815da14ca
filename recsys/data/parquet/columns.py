"""Impressions as numpy arrays, from which batches copy rows by position.

Shapes: R rows, N values of all lists of a column, n selected rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.data.parquet.values import is_list, list_lengths, one_chunk


@dataclass(frozen=True)
class ListColumns:
    """List columns whose lists have equal lengths."""

    offsets: np.ndarray  # int64 [R + 1]
    values: dict[str, np.ndarray]  # [N] by column

    def take(self, rows: np.ndarray) -> ListColumns:  # [n]
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        ends = np.cumsum(lengths)
        indices = np.repeat(starts - ends + lengths, lengths)
        indices += np.arange(len(indices))
        offsets = np.concatenate([[0], ends])
        selected = {name: values.take(indices) for name, values in self.values.items()}
        return ListColumns(offsets, selected)


@dataclass(frozen=True)
class RowColumns:
    """R impressions."""

    numbers: dict[str, np.ndarray]  # [R] by column
    lists: tuple[ListColumns, ...]  # list columns, grouped by equal lengths

    @staticmethod
    def of(table: pa.Table) -> RowColumns:
        """Convert a table of canonical types (`recsys.data.parquet.values`), sharing its memory."""
        numbers: dict[str, np.ndarray] = {}
        lists: list[ListColumns] = []
        for name in table.column_names:
            array = one_chunk(table[name])
            if not is_list(array.type):
                numbers[name] = array.to_numpy(zero_copy_only=False)
                continue
            # `flatten` omits values of null lists, so compute offsets from the lengths.
            offsets = np.concatenate([[0], np.cumsum(list_lengths(array), dtype=np.int64)])
            equal = (columns for columns in lists if np.array_equal(columns.offsets, offsets))
            if (columns := next(equal, None)) is None:
                lists.append(columns := ListColumns(offsets, {}))
            columns.values[name] = array.flatten().to_numpy(zero_copy_only=False)
        return RowColumns(numbers, tuple(lists))

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.numbers.values())))

    def values(self, name: str) -> np.ndarray:
        """Return the values of all lists of a column, [N]; [R] for a column of numbers."""
        return self.numbers[name] if name in self.numbers else self._lists_of(name).values[name]

    def lengths(self, name: str) -> np.ndarray:
        """Return the lengths of a column's lists, int64 [R]; 1 each for a column of numbers."""
        if name in self.numbers:
            return np.ones(self.num_rows, np.int64)
        return np.diff(self._lists_of(name).offsets)

    def _lists_of(self, name: str) -> ListColumns:
        return next(columns for columns in self.lists if name in columns.values)

    def take(self, rows: np.ndarray) -> RowColumns:  # [n]
        return RowColumns(
            {name: values.take(rows) for name, values in self.numbers.items()},
            tuple(columns.take(rows) for columns in self.lists),
        )

    @staticmethod
    def concat(chunks: Sequence[RowColumns]) -> RowColumns:
        if len(chunks) == 1:
            return chunks[0]

        def joined(name: str) -> np.ndarray:
            return np.concatenate([chunk.values(name) for chunk in chunks])

        # Columns with equal lengths in one chunk may differ in another: each has its own offsets.
        lists = []
        for name in (name for columns in chunks[0].lists for name in columns.values):
            ends = np.cumsum(np.concatenate([chunk.lengths(name) for chunk in chunks]))
            lists.append(ListColumns(np.concatenate([[0], ends]), {name: joined(name)}))
        return RowColumns({name: joined(name) for name in chunks[0].numbers}, tuple(lists))
