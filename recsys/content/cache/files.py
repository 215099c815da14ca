"""Files of the cache of an encoder's frozen part: their names, unfinished parts, earlier caches.

Shapes: N rows of an array, S distinct contents, n rows of a call or to reuse, D output width.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.config import ModalitySettings
from recsys.content.encoders.base import ITEMS_PER_GROUP, SHORT_LENGTHS, Encoder
from recsys.content.encoders.identity import weights_digest
from recsys.data.items.item_table import digest_of
from recsys.data.items.ragged_array import HASHES, RaggedArray
from recsys.storage.files import whole_file

ABOUT = "about.json"


@dataclass(frozen=True)
class DistinctRows:
    """Rows of an array by their content; each content is encoded and stored once.

    first: int64 [S], ascending, the first row of each content.
    number: int64 [N], the place of each row's content in `first`; -1 for a row without content.
    """

    first: np.ndarray
    number: np.ndarray

    @staticmethod
    def of(hashes: np.ndarray) -> DistinctRows:  # [N], empty for a row without content
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
        return int((self.number >= 0).sum())

    @property
    def repeat(self) -> bool:
        return len(self.first) < self.num_rows

    @property
    def places(self) -> np.ndarray:  # int64 [N]
        """Return where each row is stored: with its equals, or in its own place if none repeats."""
        return self.number if self.repeat else np.arange(len(self.number))

    def describe(self, count: int) -> str:
        items = f"{count:,} items"
        return f"{count:,} distinct contents of {self.num_rows:,} items" if self.repeat else items


def encoder_key(encoder: Encoder) -> str:
    """Return a hash of frozen weights, settings and batch shapes; what trains is left out."""
    shapes: tuple[Any, ...] = (ITEMS_PER_GROUP, SHORT_LENGTHS, encoder.max_length)
    if encoder.frozen_dtype != torch.float32:
        shapes = (*shapes, dtype_of(encoder))
    trained = {name for name, value in encoder.named_parameters() if value.requires_grad}
    weights = weights_digest(encoder, leave_out=trained)
    return digest_of(weights, encoder.frozen_settings(), shapes)


def dtype_of(encoder: Encoder) -> str:
    """Return the name of the type in which an encoder's cache stores its outputs."""
    return str(encoder.frozen_dtype).removeprefix("torch.")


def write_about(
    folder: Path,
    key: str,
    content: str,
    encoder: Encoder,
    modality: ModalitySettings,
    counts: dict[str, int],
) -> None:
    """Write `about.json`, for people and for later caches of the same encoder."""
    identity = encoder.identity
    about = {
        "encoder": modality.encoder or modality.module,
        "revision": modality.revision if identity is None else identity.revision,
        "training": modality.training,
        "pooling": modality.pooling,
        "encoder_key": key,
        "content": content,
        "dtype": dtype_of(encoder),
        **counts,
        "device": str(next((part.device for part in encoder.parameters()), "cpu")),
        "versions": {
            "recsys-em3": importlib.metadata.version("recsys-em3"),
            "torch": torch.__version__,
        },
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


@dataclass
class EarlierCache:
    """A finished cache that holds some rows of the new one.

    rows: [n], rows of the new cache; places: [n], rows of the earlier one with the same content.
    """

    folder: Path
    rows: np.ndarray
    places: np.ndarray


def caches_of(cache: Path, encoder_key: str) -> list[str]:
    """Return the names of the usable caches of an encoder, the newest first."""
    names = []
    for about in cache.glob(f"frozen-*/{ABOUT}"):
        try:
            if json.loads(about.read_text())["encoder_key"] == encoder_key:
                hashes = np.load(about.parent / HASHES, allow_pickle=False)
                if len(hashes) == len(RaggedArray(about.parent)) > 0:
                    names.append((about.stat().st_mtime_ns, about.parent.name))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or being removed: encoding again is always correct
    return [name for _, name in sorted(names, reverse=True)]


def find_in(
    cache: Path,
    names: list[str],
    hashes: np.ndarray,  # [N]
    missing: np.ndarray,  # [n]
) -> list[EarlierCache]:
    """Return which of the missing rows earlier caches hold; each row at most once."""
    caches = []
    for name in names:
        cached_hashes = np.load(cache / name / HASHES, allow_pickle=False)
        order = np.argsort(cached_hashes, kind="stable")
        place = np.searchsorted(cached_hashes, hashes[missing], sorter=order).clip(
            max=len(cached_hashes) - 1
        )
        is_cached = cached_hashes[order[place]] == hashes[missing]
        if is_cached.any():
            caches.append(EarlierCache(cache / name, missing[is_cached], order[place[is_cached]]))
        missing = missing[~is_cached]
    return caches


class Parts:
    """Folder of the files of finished calls, each complete or absent, named by their content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def holds(self, name: str) -> bool:
        return self._path(name).exists()

    def write(
        self,
        name: str,
        lengths: np.ndarray,  # [n], number of tokens of each item
        values: np.ndarray,  # [sum of lengths, D]
    ) -> None:
        with whole_file(self._path(name)) as partial, partial.open("wb") as file:
            np.savez(file, lengths=lengths, values=values)

    def read(self, name: str, array: str) -> np.ndarray:
        """Return `lengths` [n] or `values` [sum of lengths, D] of a call; damage is an error."""
        content = BytesIO(self._path(name).read_bytes())
        try:
            with np.load(content, allow_pickle=False) as arrays:
                return arrays[array]
        # Damage to an archive may raise any exception.
        except Exception as error:
            message = f"{self._path(name)}: damaged ({error}); remove it, it is made again"
            raise ValueError(message) from error

    def remove_damaged(self, names: list[str]) -> None:
        for name in filter(self.holds, names):
            try:
                self.read(name, "lengths")
                self.read(name, "values")
            except ValueError:
                self._path(name).unlink(missing_ok=True)
