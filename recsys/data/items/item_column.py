"""One column of the items: its chunks, or the .npy file that schema.yaml names in its place.

Shapes: n rows of a piece, R rows of a feature file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from recsys.data.items.feature_file import FeatureFile, read_ids
from recsys.data.items.item_table import ItemTable, digest_of
from recsys.data.parquet.bad_rows import Report


class ItemColumnReader:
    """Reads one column of the items' files."""

    def __init__(self, table: ItemTable, name: str) -> None:
        """Select a column that schema.yaml names."""
        self.table, self.name, self.settings = table, name, table.items.columns[name]

    @property
    def skips_bad_rows(self) -> bool:
        """Whether bad rows are skipped instead of raising an error."""
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
        return features, None if ids is None else read_ids(self.table.root / ids, features.num_rows)

    def places_of(self, features: FeatureFile, ids: np.ndarray | None) -> np.ndarray:  # [R]
        """Return the item's row for each row of a feature file, -1 for none.

        Raises:
            ValueError: the file has no ids, and its number of rows is not that of the items.
        """
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
        if (found := self.feature_file()) is None:
            return self.table.fingerprint(self.name)
        features, ids = found
        by_row = [] if ids is None else [str(ids.dtype), ids.tobytes()]
        rows = [self.table.ids.tobytes(), self.table.rows.tobytes()]
        return digest_of(features.fingerprint(), *by_row, *rows)

    def empty(self) -> ValueError:
        """Return the error to raise when no row has any content."""
        return ValueError(
            f"{self.table.folder}: column '{self.name}' is null or empty in every row; write the "
            "content or take the modality out of the configuration"
        )
