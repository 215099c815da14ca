"""The content of all items, read, tokenised and decoded once, served to batches by item id.

Each modality becomes a `RaggedArray` in a cache folder named by a hash of what it is made from
(the items' content and the modality's settings), so that it is made once per machine and never
stale. Text is tokenised, images are decoded and resized to uint8 pixels, stored features are
copied; the frozen part of an encoder may then replace them by its outputs
(`recsys.content.frozen_cache`). An item without text or image has no entry, which batches carry
as a mask.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from recsys.batch import ContentInput
from recsys.config import ModalitySettings
from recsys.data.filesystem import Location
from recsys.data.ragged_array import RaggedArray
from recsys.data.schema import Schema


def default_cache() -> Path:
    """Where encoded items are kept unless the configuration says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "recsys"


def digest_of(*parts: Any) -> str:
    """A hash of bytes-like and printable parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes | memoryview) else repr(part).encode())
    return digest.hexdigest()


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder` by `write(temporary folder)`: it exists whole or not at all."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(temporary)
        with contextlib.suppress(FileExistsError):  # another process was faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ItemTable:
    """The items' Parquet files: one row per item, ids checked.

    Raises:
        ValueError: no file, a missing column, a wrong type, an id that occurs twice or lies
            outside the target item's table.
    """

    def __init__(self, root: Location, schema: Schema) -> None:
        if schema.items is None:
            raise ValueError(
                f"{root}/schema.yaml: a model with content needs `items` with their columns; add "
                "them or set `content: none`"
            )
        self.schema, self.items = schema, schema.items
        self.folder = root / "items"
        files = self.folder.files(".parquet")
        if not files:
            raise ValueError(f"{self.folder}: no *.parquet files; write one row per item there")
        self.files = files
        self.ids = self._read_ids()

    def _read_ids(self) -> np.ndarray:
        parts = []
        for file, column in self._columns(self.items.id):
            if not pa.types.is_integer(column.type):
                raise ValueError(
                    f"{file}: column '{self.items.id}' has type {column.type}, expected integer"
                )
            if column.null_count:
                raise ValueError(f"{file}: column '{self.items.id}' has a null; every item needs an id")
            parts.append(column.to_numpy().astype(np.int64))
        ids = np.concatenate(parts)
        where = f"{self.folder}: column '{self.items.id}'"
        wrong = (ids < 0) | (ids >= self.schema.num_items)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{where}, row {row}: id {ids[row]} is outside [0, {self.schema.num_items}); raise "
                f"num_embeddings of '{self.schema.target_item}' in schema.yaml"
            )
        unique, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{where}: item {unique[counts > 1][0]} occurs {counts.max()} times; keep one row"
            )
        return ids

    def _columns(self, name: str) -> Iterable[tuple[Location, pa.ChunkedArray]]:
        for file in self.files:
            if not file.exists():
                raise ValueError(f"{file}: no such file")
            try:
                with pq.ParquetFile(file.path, filesystem=file.arrow) as parquet:
                    if name not in parquet.schema_arrow.names:
                        raise ValueError(
                            f"{file}: column '{name}' is missing; the file has "
                            f"{parquet.schema_arrow.names}"
                        )
                    column = parquet.read([name])[name]
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
            yield file, column

    def chunks(self, name: str) -> Iterable[tuple[Location, int, pa.Array]]:
        """(file, first row in that file, values) of a column, in order."""
        for file, column in self._columns(name):
            row = 0
            for chunk in column.chunks:
                yield file, row, chunk
                row += len(chunk)

    def fingerprint(self, name: str) -> str:
        """A hash of a column's content and of the ids it belongs to."""
        buffers: list[Any] = [self.ids.tobytes()]
        for _, _, chunk in self.chunks(name):
            # A slice would share the buffers of its parent, so hash what it holds itself.
            compact = pa.concat_arrays([chunk])
            buffers += [len(compact), *(memoryview(part) for part in compact.buffers() if part)]
        return digest_of(*buffers)


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
        self._row_of_item = np.full(items.schema.num_items, -1, dtype=np.int64)
        self._row_of_item[items.ids] = np.arange(len(items.ids))

    def build(self, name: str, tokenizer: Any = None) -> None:
        """Makes, or finds in the cache, the array of one modality.

        Raises:
            ValueError: an unreadable image or a feature of another size, with file and row.
        """
        modality = self.modalities[name]
        column = modality.column
        if modality.kind == "text":
            assert tokenizer is not None
            settings: Any = (modality.max_length, sorted(tokenizer.get_vocab().items()))
        else:
            settings = modality.image_size if modality.kind == "image" else None
        key = digest_of(self.items.fingerprint(column), modality.kind, settings)
        folder = self.cache / f"{modality.kind}-{key}"
        if modality.kind == "text":
            publish(folder, lambda path: self._write_text(path, column, modality, tokenizer))
        elif modality.kind == "image":
            publish(folder, lambda path: self._write_images(path, column, modality.image_size))
        else:
            publish(folder, lambda path: self._write_features(path, column))
        self.use(name, folder)

    def use(self, name: str, folder: Path) -> None:
        """Serves a modality from the array in `folder`."""
        self.folders[name] = folder
        self.arrays[name] = RaggedArray(folder)

    def gather(self, item_ids: np.ndarray) -> dict[str, ContentInput]:
        """Content of unique items [U], by modality; an unknown item has none."""
        rows = self._row_of_item[item_ids]
        content = {}
        for name, array in self.arrays.items():
            values, mask = array.gather(rows)
            if self.modalities[name].kind == "image" and values.dtype == np.uint8:
                values = values[:, 0]
            content[name] = ContentInput(torch.from_numpy(values), torch.from_numpy(mask))
        return content

    def _write_text(
        self, folder: Path, column: str, modality: ModalitySettings, tokenizer: Any
    ) -> None:
        token_ids: list[list[int]] = []
        for file, _, chunk in self.items.chunks(column):
            if not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
                raise ValueError(f"{file}: column '{column}' has type {chunk.type}, expected string")
            texts = chunk.to_pylist()
            known = [text for text in texts if text]
            encoded = iter(
                tokenizer(known, truncation=True, max_length=modality.max_length)["input_ids"]
                if known
                else []
            )
            token_ids += [next(encoded) if text else [] for text in texts]
        lengths = np.array([len(ids) for ids in token_ids])
        array = RaggedArray.create(folder, lengths, (), "int64")
        if lengths.sum():
            array.values[:] = np.concatenate([np.array(ids, np.int64) for ids in token_ids if ids])
        array.values.flush()

    def _write_images(self, folder: Path, column: str, size: int) -> None:
        chunks = list(self.items.chunks(column))
        for file, _, chunk in chunks:
            if not (pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type)):
                raise ValueError(f"{file}: column '{column}' has type {chunk.type}, expected binary")
        lengths = np.concatenate([chunk.is_valid().to_numpy(False) for _, _, chunk in chunks])
        array = RaggedArray.create(folder, lengths.astype(np.int64), (3, size, size), "uint8")
        place = 0
        for file, first_row, chunk in chunks:
            for row, encoded in enumerate(chunk):
                if encoded.is_valid:
                    where = f"{file}: column '{column}', row {first_row + row}"
                    array.values[place] = decode_image(encoded.as_py(), size, where)
                    place += 1
        array.values.flush()

    def _write_features(self, folder: Path, column: str) -> None:
        parts, lengths, width = [], [], None
        for file, first_row, chunk in self.items.chunks(column):
            for row, value in enumerate(_feature_rows(chunk, column, file)):
                if value is None:
                    lengths.append(0)
                    continue
                width = width or value.shape[1]
                if value.shape[1] != width or not np.isfinite(value).all():
                    raise ValueError(
                        f"{file}: column '{column}', row {first_row + row}: feature of width "
                        f"{value.shape[1]} (expected {width}) or with a value that is not finite"
                    )
                lengths.append(len(value))
                parts.append(value)
        if width is None:
            raise ValueError(f"{self.items.folder}: column '{column}' is null in every row")
        array = RaggedArray.create(folder, np.array(lengths), (width,), "float32")
        array.values[:] = np.concatenate(parts)
        array.values.flush()


def _feature_rows(chunk: pa.Array, column: str, file: Location) -> Iterable[np.ndarray | None]:
    """Each row as [T, D]: a list of floats is one token, a list of lists is T tokens."""
    kind = chunk.type
    nested = pa.types.is_nested(kind) and pa.types.is_nested(kind.value_type)
    value = kind.value_type.value_type if nested else getattr(kind, "value_type", None)
    if value is None or not pa.types.is_floating(value):
        raise ValueError(f"{file}: column '{column}' has type {kind}, expected list<float>")
    for row in chunk:
        if not row.is_valid or len(row) == 0:
            yield None
        else:
            array = np.array(row.as_py(), dtype=np.float32)
            yield array if nested else array[None]


def decode_image(encoded: bytes, size: int, where: str) -> np.ndarray:
    """Encoded image bytes -> uint8 [3, size, size]: shorter side to `size`, centre cut out.

    Raises:
        ValueError: the bytes are not an image; `where` names the row.
    """
    try:
        image = Image.open(BytesIO(encoded)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where}: not a readable image ({error}); write JPEG or PNG bytes, or null for an "
            "item without an image"
        ) from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


