"""The content of all items, read, tokenised and decoded once, served to batches by item id.

Each modality becomes a `RaggedArray` in a cache folder named by a hash of what it is made from
(the items' content and the modality's settings), so that it is made once per machine and never
stale. Text is tokenised, images are decoded and resized to uint8 pixels, stored features are
copied; the frozen part of an encoder may then replace them by its outputs
(`recsys.content.frozen_cache`). An item without text or image has no entry, which batches carry
as a mask.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recsys.batch import ContentInput
from recsys.config import ModalitySettings
from recsys.data.bad_rows import Report
from recsys.data.images import decode_image
from recsys.data.item_features import feature_tokens, usable_features
from recsys.data.item_table import ItemTable, digest_of
from recsys.data.item_text import texts_of, tokenize, tokenizer_state
from recsys.data.ragged_array import RaggedArray, RaggedWriter
from recsys.data.row_values import list_lengths

SKIPPED = "skipped.json"  # beside an array: what is missing from it because it could not be used


def default_cache() -> Path:
    """Where encoded items are kept unless the configuration says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "recsys"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder` by `write(temporary folder)`: it exists whole or not at all."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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

    def build(self, name: str, tokenizer: Any = None) -> None:
        """Makes, or finds in the cache, the array of one modality.

        Raises:
            ValueError: a text, image or feature that cannot be used, with file and row (unless the
                items' `on_bad_row` is skip: then it is missing), or all are missing.
        """
        modality = self.modalities[name]
        column = modality.column
        write: Callable[[Path], None]
        if modality.kind == "text":
            assert tokenizer is not None
            settings: Any = (modality.max_length, tokenizer_state(tokenizer))
            write = partial(self._write_text, column, modality.max_length, tokenizer)
        elif modality.kind == "image":
            settings = modality.image_size
            write = partial(self._write_images, column, modality.image_size)
        else:
            settings = None
            write = partial(self._write_features, column)
        if self.items.bad_rows.on_bad_row == "skip":
            settings = (settings, "skip", str(self.items.folder))  # named in what is reported
        key = digest_of(self.items.fingerprint(column), modality.kind, settings)
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
            values, mask = array.gather(rows)
            if self.modalities[name].kind == "image" and values.dtype == np.uint8:
                values = values[:, 0]
            content[name] = ContentInput(torch.from_numpy(values), torch.from_numpy(mask))
        return content

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

    def _write_text(self, column: str, max_length: int, tokenizer: Any, folder: Path) -> None:
        with closing(RaggedWriter(folder, (), "int64")) as writer:
            for chunk, where, report in self._chunks(column):
                tokens = tokenize(texts_of(chunk, where, report), max_length, tokenizer)
                lengths = np.array([len(ids) for ids in tokens], np.int64)
                writer.add(lengths, np.fromiter(chain.from_iterable(tokens), np.int64))
        if not writer.num_entries:
            raise self._nothing_in(column)

    def _write_images(self, column: str, size: int, folder: Path) -> None:
        with closing(RaggedWriter(folder, (3, size, size), "uint8")) as writer:
            for chunk, where, report in self._chunks(column):
                if not (pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type)):
                    raise ValueError(f"{where} has type {chunk.type}, expected binary")
                writer.add(*_decoded_images(chunk, size, report))
        if not writer.num_entries:
            raise self._nothing_in(column)

    def _write_features(self, column: str, folder: Path) -> None:
        width = self._feature_width(column)
        with closing(RaggedWriter(folder, (width,), "float32")) as writer:
            for chunk, where, report in self._chunks(column):
                writer.add(*usable_features(*feature_tokens(chunk, where), width, report))

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


def _decoded_images(chunk: pa.Array, size: int, report: Report) -> tuple[np.ndarray, np.ndarray]:
    """(number of images of each row, 0 or 1, and their pixels [sum, 3, size, size])."""
    lengths = np.zeros(len(chunk), np.int64)
    pixels = np.empty((len(chunk) - chunk.null_count, 3, size, size), np.uint8)
    causes: dict[int, str] = {}
    for row, encoded in enumerate(chunk):
        if encoded.is_valid:
            try:
                pixels[lengths.sum()] = decode_image(encoded.as_py(), size)
                lengths[row] = 1
            except ValueError as error:
                causes[row] = str(error)
    bad = np.isin(np.arange(len(chunk)), list(causes))
    report(bad, "unreadable image", causes.__getitem__)
    return lengths, pixels[: lengths.sum()]
