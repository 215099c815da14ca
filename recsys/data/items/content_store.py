"""Content of all items: read, tokenised and decoded once, then gathered for batches by item id.

Each modality is a `RaggedArray` in a cache folder named by a hash of content and settings.
Shapes: U unique items, N items with a row.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from embeddings.vocabulary.fixed import mix64
from recsys.config import ModalitySettings
from recsys.data.items.item_table import ItemColumnReader, ItemTable, digest_of
from recsys.data.items.kind import ContentInput, ModalityKind, make_kinds
from recsys.data.items.ragged_array import RaggedArray, stored_hashes
from recsys.data.schema_columns import Items
from recsys.storage.files import atomic_folder, home_expanded

SKIPPED = "skipped.json"  # file in an array's folder with the unusable rows that it lacks


def default_cache() -> Path:
    """Return the cache folder that is used unless the configuration sets one."""
    return home_expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "recsys"


class ContentStore:
    """Content of all items by modality; with `may_be_empty`, all items may lack content."""

    def __init__(
        self,
        items: ItemTable,
        modalities: Mapping[str, ModalitySettings],
        cache: Path,
        may_be_empty: bool = False,
    ) -> None:
        self.items, self.kinds, self.cache = items, make_kinds(modalities), cache
        self.may_be_empty = may_be_empty
        for kind in self.kinds.values():
            require_column(items.items, kind)
            kind.check_column(ItemColumnReader(items, kind.modality.column))
        self.arrays: dict[str, RaggedArray] = {}
        self.folders: dict[str, Path] = {}
        self.hashes: dict[str, np.ndarray] = {}  # hash of each row's content, before any encoder
        order = np.argsort(items.ids)
        self._ids, self._rows = items.ids[order], items.rows[order]

    def build(self, name: str) -> None:
        """Open the array of one modality from the cache, or build it first."""
        kind = self.kinds[name]
        column, settings = ItemColumnReader(self.items, kind.modality.column), kind.key()
        if self.may_be_empty:  # a column of nulls does not determine the width of a feature
            settings = (settings, kind.entry_shape)
        if column.skips_bad_rows:
            settings = (settings, "skip", str(self.items.folder))  # cached reports name the folder
        key = digest_of(column.fingerprint(), kind.modality.kind, settings)
        folder = self.cache / f"{type(kind).__name__.lower()}-{key}"
        if not folder.exists():
            with atomic_folder(folder, may_exist=True) as partial:
                if not kind.write(column, partial) and not self.may_be_empty:
                    raise column.empty()
                bad_rows = self.items.bad_rows.counts.items()
                skipped = [[*cause, *rows] for cause, rows in bad_rows if cause[1] == column.name]
                (partial / SKIPPED).write_text(json.dumps(skipped))
        for *cause, rows, first in json.loads((folder / SKIPPED).read_text()):
            self.items.bad_rows.counts[tuple(cause)] = (rows, first)
        self.hashes[name] = stored_hashes(folder)
        self.use(name, folder)
        assert len(self.arrays[name]) == self.items.num_rows

    def use(self, name: str, folder: Path) -> None:
        self.folders[name], self.arrays[name] = folder, RaggedArray(folder)

    def gather(self, item_ids: np.ndarray) -> dict[str, ContentInput]:  # [U]
        """Return the content of unique items, by modality; unknown items have no content."""
        rows, kinds = self.rows_of(item_ids), self.kinds
        arrays = self.arrays.items()
        return {name: kinds[name].as_input(*array.gather(rows)) for name, array in arrays}

    def rows_of(self, item_ids: np.ndarray) -> np.ndarray:  # [U] -> int64 [U]
        """Return the rows of items in the arrays, -1 for an unknown item."""
        index = np.searchsorted(self._ids, item_ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[index] == item_ids, self._rows[index], -1)

    def item_hashes(self) -> tuple[np.ndarray, np.ndarray]:  # int64 [N], uint64 [N]
        """Return the ids of all items, ascending, and a hash of the content of each."""
        hashes = np.zeros(len(self._ids), np.uint64)
        for row_hashes in self.hashes.values():
            for half in row_hashes[self._rows].view(np.uint64).reshape(-1, 2).T:
                hashes = mix64(hashes ^ half)
        return self._ids, hashes


def require_column(items: Items, kind: ModalityKind) -> None:
    """Raise a ValueError if the items have no column of the kind that a modality reads."""
    name = kind.modality.column
    column = items.columns.get(name)
    if column is None or column.kind != kind.column_kind:
        choices = ", ".join(f"{name} ({column.kind})" for name, column in items.columns.items())
        raise ValueError(
            f"{kind.where}: schema.yaml has no item column '{name}' of kind {kind.column_kind}; "
            f"name one of {choices}, or leave the modality out: --{kind.where} null"
        )
