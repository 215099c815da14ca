"""The content of all items, read, tokenised and decoded once, served to batches by item id.

Each modality becomes a `RaggedArray` in a cache folder named by a hash of what it is made from
(the items' content and the modality's settings), so that it is made once per machine and never
stale. Text is tokenised, images are decoded and resized to uint8 pixels, stored features are
copied; the frozen part of an encoder may then replace them by its outputs
(`recsys.content.cache.fill`). An item without text or image has no entry, which batches carry
as a mask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recsys.config import ModalitySettings
from recsys.data.batch import ContentInput
from recsys.data.filesystem import whole_folder
from recsys.data.items.feature_file import FeatureFile, read_ids, write_rows
from recsys.data.items.images import ImagePreparation
from recsys.data.items.item_features import feature_tokens, usable_features
from recsys.data.items.item_images import decoded_images
from recsys.data.items.item_table import ItemTable, digest_of
from recsys.data.items.item_text import texts_of, tokenize, tokenizer_state
from recsys.data.items.ragged_array import RaggedArray, RaggedWriter
from recsys.data.parquet.bad_rows import Report
from recsys.data.parquet.values import list_lengths

SKIPPED = "skipped.json"  # beside an array: what is missing from it because it could not be used


def default_cache() -> Path:
    """Where encoded items are kept unless the configuration says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "recsys"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder` by `write(temporary folder)`: it exists whole or not at all."""
    if folder.exists():
        return
    with whole_folder(folder, may_exist=True) as partial:
        write(partial)


class ContentStore:
    """Content of all items by modality.

    Args:
        items: the items' files.
        modalities: settings by modality name.
        cache: folder for the arrays.

    Example::

        store = ContentStore(ItemTable(root, schema), content.modalities, default_cache())
        store.build("text", tokenizer)
        store.gather(np.array([3, 5]))["text"].values  # [2, T]
    """

    def __init__(
        self, items: ItemTable, modalities: dict[str, ModalitySettings], cache: Path
    ) -> None:
        assert items.schema.items is not None
        for name, modality in modalities.items():
            column = items.items.columns.get(modality.column)
            if column is None or column.kind != modality.kind:
                raise ValueError(
                    f"content.modalities.{name}: schema.yaml has no item column "
                    f"'{modality.column}' of kind {modality.kind}; it has {items.items.columns}"
                )
        self.items, self.modalities, self.cache = items, modalities, cache
        self.arrays: dict[str, RaggedArray] = {}
        self.folders: dict[str, Path] = {}
        order = np.argsort(items.ids)
        self._ids, self._rows = items.ids[order], items.rows[order]

    def build(
        self,
        name: str,
        tokenizer: Any = None,
        fills_texts: bool = False,
        images: ImagePreparation | None = None,
    ) -> None:
        """Makes, or finds in the cache, the array of one modality.

        Args:
            name: the modality.
            tokenizer: of its texts.
            fills_texts: texts are filled up with padding that counts as tokens.
            images: what is done to its images.

        Raises:
            ValueError: a text, image or feature that cannot be used, with file and row (unless the
                items' `on_bad_row` is skip: then it is missing), or all are missing.
        """
        modality = self.modalities[name]
        column = modality.column
        write: Callable[[Path], None]
        if modality.kind == "text":
            assert tokenizer is not None
            settings: Any = (modality.max_length, tokenizer_state(tokenizer), fills_texts)
            write = partial(self._write_text, column, modality.max_length, tokenizer, fills_texts)
        elif modality.kind == "image":
            images = images or ImagePreparation()
            settings = (modality.image_size, modality.max_images, images)
            write = partial(self._write_images, column, modality, images)
        else:
            settings = None
            write = partial(self._write_features, column)
        if self.items.bad_rows.on_bad_row == "skip":
            settings = (settings, "skip", str(self.items.folder))  # named in what is reported
        key = digest_of(self._fingerprint(column), modality.kind, settings)
        folder = self.cache / f"{modality.kind}-{key}"
        publish(folder, lambda path: self._write(path, column, write))
        self._read_skipped(folder)
        self.use(name, folder)
        assert len(self.arrays[name]) == self.items.num_rows

    def use(self, name: str, folder: Path) -> None:
        """Serves a modality from the array in `folder`."""
        self.folders[name] = folder
        self.arrays[name] = RaggedArray(folder)

    def gather(self, item_ids: np.ndarray) -> dict[str, ContentInput]:
        """Content of unique items [U], by modality; an unknown item has none."""
        place = np.searchsorted(self._ids, item_ids).clip(max=len(self._ids) - 1)
        rows = np.where(self._ids[place] == item_ids, self._rows[place], -1)
        content = {}
        for name, array in self.arrays.items():
            content[name] = as_input(self.modalities[name], *array.gather(rows))
        return content

    def _fingerprint(self, column: str) -> str:
        """A hash of a column's content and of the ids it belongs to."""
        source = self.items.items.columns[column]
        if source.file is None:
            return self.items.fingerprint(column)
        features = FeatureFile(self.items.root / source.file)
        ids = read_ids(self.items.root / source.ids, features.num_rows) if source.ids else None
        by_row = [] if ids is None else [str(ids.dtype), ids.tobytes()]
        rows = [self.items.ids.tobytes(), self.items.rows.tobytes()]
        return digest_of(features.fingerprint(), *by_row, *rows)

    def _write(self, folder: Path, column: str, write: Callable[[Path], None]) -> None:
        """The array and, beside it, what was skipped."""
        write(folder)
        skipped = self.items.bad_rows.of_column(column)
        (folder / SKIPPED).write_text(
            json.dumps([[*place, *rows] for place, rows in skipped.items()])
        )

    def _read_skipped(self, folder: Path) -> None:
        for *place, rows, first in json.loads((folder / SKIPPED).read_text()):
            self.items.bad_rows.found[tuple(place)] = (rows, first)

    def _chunks(self, column: str) -> Iterator[tuple[pa.Array, str, Report]]:
        """(values, file and column for messages, how to tell of bad rows) of each chunk."""
        for file, first_row, chunk in self.items.chunks(column):
            report = partial(self.items.bad_rows.add, file, column, first_row)
            yield chunk, f"{file}: column '{column}'", report

    def _write_text(
        self, column: str, max_length: int, tokenizer: Any, fills: bool, folder: Path
    ) -> None:
        with closing(RaggedWriter(folder, (), "int64")) as writer:
            for chunk, where, report in self._chunks(column):
                tokens = tokenize(texts_of(chunk, where, report), max_length, tokenizer, fills)
                lengths = np.array([len(ids) for ids in tokens], np.int64)
                writer.add(lengths, np.fromiter(chain.from_iterable(tokens), np.int64))
        if not writer.num_entries:
            raise self._nothing_in(column)

    def _write_images(
        self, column: str, modality: ModalitySettings, images: ImagePreparation, folder: Path
    ) -> None:
        size, most, cut = modality.image_size, modality.max_images, 0
        with closing(RaggedWriter(folder, (3, size, size), "uint8")) as writer:
            for chunk, where, report in self._chunks(column):
                lengths, pixels, more = decoded_images(chunk, size, most, images, where, report)
                writer.add(lengths, pixels)
                cut += more
        if not writer.num_entries:
            raise self._nothing_in(column)
        if cut:
            print(
                f"column '{column}': {cut:,} items have more than max_images {most} images; the "
                f"first {most} of each are used",
                flush=True,
            )

    def _write_features(self, column: str, folder: Path) -> None:
        if self.items.items.columns[column].file is not None:
            return self._write_feature_file(column, folder)
        width = self._feature_width(column)
        with closing(RaggedWriter(folder, (width,), "float32")) as writer:
            for chunk, where, report in self._chunks(column):
                writer.add(*usable_features(*feature_tokens(chunk, where), width, report))

    def _write_feature_file(self, column: str, folder: Path) -> None:
        source = self.items.items.columns[column]
        assert source.file is not None
        features = FeatureFile(self.items.root / source.file)
        if source.ids is not None:
            ids_file = self.items.root / source.ids
            places = self.items.places_of(read_ids(ids_file, features.num_rows), ids_file)
        elif features.num_rows == self.items.num_rows:
            places = np.arange(features.num_rows)
        else:
            raise ValueError(
                f"{features.file}: has {features.num_rows} rows, the items' files "
                f"{self.items.num_rows}; write one row per item in their order, or name a .npy "
                f"file of its ids in schema.yaml: items.columns.{column}.ids"
            )

        def report(first_row: int, bad: np.ndarray, reason: str) -> None:
            message = f"{reason}; write NaN throughout for a token or an item that is not there"
            bad_rows = self.items.bad_rows
            bad_rows.add(features.file, column, first_row, bad, reason, lambda row: message)

        if not write_rows(folder, features, places, self.items.num_rows, report):
            raise self._nothing_in(column)

    def _feature_width(self, column: str) -> int:
        """Of the first feature; if bad ones are skipped, which it may be, the most frequent one."""
        for chunk, where, _ in self._chunks(column):
            widths = list_lengths(feature_tokens(chunk, where)[1])
            if len(widths):
                is_skip = self.items.bad_rows.on_bad_row == "skip"
                return int(np.bincount(widths).argmax() if is_skip else widths[0])
        raise self._nothing_in(column)

    def _nothing_in(self, column: str) -> ValueError:
        return ValueError(
            f"{self.items.folder}: column '{column}' is null or empty in every row; write the "
            "content or take the modality out of the configuration"
        )


def as_input(
    modality: ModalitySettings,
    values: np.ndarray,  # [U, T, ...]
    mask: np.ndarray,  # [U, T]
) -> ContentInput:
    """Padded rows of a modality's array as encoders take them: a single image is no list of one."""
    if modality.kind == "image" and values.dtype == np.uint8 and modality.max_images == 1:
        values = values[:, 0]
    return ContentInput(torch.from_numpy(values), torch.from_numpy(mask))
