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
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from recsys.batch import ContentInput
from recsys.config import ModalitySettings
from recsys.data.item_table import ItemTable, digest_of
from recsys.data.parquet_rows import is_list, list_lengths
from recsys.data.ragged_array import RaggedArray


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
            settings: Any = (modality.max_length, _tokenizer_state(tokenizer))
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
                raise ValueError(
                    f"{file}: column '{column}' has type {chunk.type}, expected string"
                )
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
        lengths = []
        for file, _, chunk in self.items.chunks(column):
            if not (pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type)):
                raise ValueError(
                    f"{file}: column '{column}' has type {chunk.type}, expected binary"
                )
            lengths.append(chunk.is_valid().to_numpy(False).astype(np.int64))
        array = RaggedArray.create(folder, np.concatenate(lengths), (3, size, size), "uint8")
        place = 0
        # Read again rather than held: encoded images of many items would not fit in memory.
        for file, first_row, chunk in self.items.chunks(column):
            for row, encoded in enumerate(chunk):
                if encoded.is_valid:
                    where = f"{file}: column '{column}', row {first_row + row}"
                    array.values[place] = decode_image(encoded.as_py(), size, where)
                    place += 1
        array.values.flush()

    def _write_features(self, folder: Path, column: str) -> None:
        width: int | None = None
        counts, parts = [], []
        for file, first_row, chunk in self.items.chunks(column):
            where = f"{file}: column '{column}'"
            tokens_per_row, tokens = _feature_tokens(chunk, where)
            counts.append(tokens_per_row)
            if len(tokens):
                width = width or int(list_lengths(tokens)[0])
                rows = first_row + np.repeat(np.arange(len(chunk)), tokens_per_row)
                parts.append(_feature_values(tokens, width, rows, where))
        if width is None:
            raise ValueError(
                f"{self.items.folder}: column '{column}' is null or empty in every row; write the "
                "features or take the modality out of the configuration"
            )
        array = RaggedArray.create(folder, np.concatenate(counts), (width,), "float32")
        np.concatenate(parts, out=array.values)
        array.values.flush()


def _tokenizer_state(tokenizer: Any) -> Any:
    """Everything that decides how a text is cut: vocabulary, normalisation, merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(tokenizer), sorted(tokenizer.get_vocab().items())
    state = json.loads(backend.to_str())
    # What the last call asked for, which the backend remembers.
    return json.dumps({**state, "truncation": None, "padding": None})


def _feature_tokens(chunk: pa.Array, where: str) -> tuple[np.ndarray, pa.Array]:
    """(tokens of each row, all tokens as lists of floats).

    A list of floats is one token, a list of lists as many as it holds; null and empty are none.
    """
    kind = chunk.type
    is_nested = is_list(kind) and is_list(kind.value_type)
    value = kind.value_type if is_list(kind) else kind
    value = value.value_type if is_nested else value
    if not is_list(kind) or not pa.types.is_floating(value):
        raise ValueError(f"{where} has type {kind}, expected list<float> or list<list<float>>")
    lengths = list_lengths(chunk)
    if is_nested:
        return lengths, chunk.flatten()
    return (lengths > 0).astype(np.int64), chunk.filter(pa.array(lengths > 0))


def _feature_values(tokens: pa.Array, width: int, rows: np.ndarray, where: str) -> np.ndarray:
    """Tokens as float32 [T, width]; `rows` [T] are the rows they are of, for messages."""
    widths = list_lengths(tokens)
    wrong = widths != width
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(
            f"{where}, row {rows[index]}: a feature has {widths[index]} values, earlier ones have "
            f"{width}; write all of one width, or null for an item without"
        )
    flat = tokens.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = flat.reshape(len(tokens), width)
    wrong = ~np.isfinite(values).all(axis=1)
    if wrong.any():
        raise ValueError(
            f"{where}, row {rows[int(wrong.argmax())]}: a feature has a value that is null or not "
            "finite; write null for an item without"
        )
    return values


def decode_image(encoded: bytes, size: int, where: str) -> np.ndarray:
    """Encoded image bytes -> uint8 [3, size, size]: the centre square, resized.

    Raises:
        ValueError: the bytes are not an image; `where` names the row.
    """
    try:
        image = Image.open(BytesIO(encoded)).convert("RGB")
    # Decoders of damaged bytes raise whatever their format's parser stumbles over.
    except Exception as error:
        raise ValueError(
            f"{where}: not a readable image ({error}); write JPEG or PNG bytes, or null for an "
            "item without an image"
        ) from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).transpose(2, 0, 1)
