"""Modality kinds, each of which reads, stores and encodes one kind of item content.

Shapes: n rows of a chunk, U unique items, T entries of the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recsys.config import ModalitySettings
from recsys.config.named_parts import make_part
from recsys.data.items.item_table import ItemColumnReader, digest_of
from recsys.data.items.ragged_array import RaggedWriter
from recsys.data.parquet.bad_rows import Report

if TYPE_CHECKING:  # settings are checked without torch
    import torch
    from torch import Tensor, nn

MODALITY_KINDS = {
    "text": "recsys.content.kinds.text:Text",
    "image": "recsys.content.kinds.image:Image",
    "feature": "recsys.content.kinds.feature:Feature",
    "frames": "recsys.content.kinds.image:Frames",
    "terms": "recsys.content.kinds.terms:Terms",
}
SETTING_READERS = {  # kinds of the package that read a setting
    "image_size": ("image", "frames"),
    "max_length": ("text", "terms"),
    "separator": ("terms",),
    "num_embeddings": ("terms",),
    "embedding_dim": ("terms",),
    "revision": ("text", "image", "frames"),
}


@dataclass
class ContentInput:
    """Content of one modality for U unique items, as its encoder reads it.

    values: token ids int64 [U, T], pixels uint8 [U, 3, H, W] or features float32 [U, T, width].
    mask: bool [U, T], False for padding; [U, 1] for pixels. All False: the item has no content.
    """

    values: Tensor
    mask: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> ContentInput:
        values = self.values.to(device=device, non_blocking=non_blocking)
        return ContentInput(values, self.mask.to(device=device, non_blocking=non_blocking))

    def __getitem__(self, items: slice | Tensor) -> ContentInput:
        return ContentInput(self.values[items], self.mask[items])


class ModalityKind:
    """Interface of all modality kinds; `recsys/content/README.md` has a user-defined example.

    `where` is the full name of the settings, for messages.
    """

    column_kind: str  # kind in schema.yaml of the item columns that this kind reads
    entry_shape: tuple[int, ...] = ()  # shape of one entry of an item's row in the cache
    dtype: str = "float32"  # type of an entry

    def __init__(self, where: str, modality: ModalitySettings) -> None:
        self.where, self.modality = where, modality
        self.notes: list[str] = []  # for the user, set when the encoder is built
        self.check()

    def check(self) -> None:
        """Raise a ValueError that names settings that do not fit this kind."""
        if self.modality.max_images > 1:
            raise ValueError(
                f"{self.where}: max_images is of kind image, not {self.modality.kind}; remove it"
            )

    def check_column(self, column: ItemColumnReader) -> None:
        """Raise a ValueError if the column's first content is unusable, before all are prepared."""

    def key(self) -> Any:
        """Return everything that entries depend on besides the column's content, printable."""
        return self.modality.options or None

    def entries(
        self, chunk: pa.Array, where: str, report: Report
    ) -> tuple[np.ndarray, np.ndarray]:  # [n], [sum of them, *entry_shape]
        """Return the number of entries of each row of a chunk, and all entries in order.

        `report` receives unusable rows, which have no entries; `where` starts error messages.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no entries")

    def as_input(
        self, values: np.ndarray, mask: np.ndarray
    ) -> ContentInput:  # values [U, T, *entry_shape], mask [U, T]
        """Return padded rows, or outputs of frozen layers, as input of the encoder."""
        import torch

        return ContentInput(torch.from_numpy(values), torch.from_numpy(mask))

    def encoder(self, entry_shape: tuple[int, ...]) -> nn.Module:
        """Return the encoder of cached entries, a `recsys.content.encoders.base.Encoder`."""
        raise NotImplementedError(f"{type(self).__name__} defines no encoder")

    def preparation_digest(self) -> str:
        """Return a hash of how content is prepared; scoring refuses runs with another hash."""
        return digest_of(self.key())

    def lengths(self, chunk: pa.Array, where: str) -> np.ndarray:  # [n]
        """Return the number of entries of each row, without reporting bad ones."""
        return self.entries(chunk, where, lambda bad, reason, message: None)[0]

    def write(self, column: ItemColumnReader, folder: Path) -> int:
        """Write the `RaggedArray` of a column and return its number of entries."""
        with closing(RaggedWriter(folder, self.entry_shape, self.dtype)) as writer:
            for chunk, where, report in column.chunks():
                writer.add(*self.entries(chunk, where, report))
        return writer.num_entries


def make_kind(where: str, modality: ModalitySettings) -> ModalityKind:
    """Return the kind that a modality's settings name, or raise a ValueError about them."""
    setting = f"{where}.kind"
    if modality.options and modality.kind in MODALITY_KINDS:
        raise ValueError(
            f"{where}.options are for a class of your own, but {setting} is '{modality.kind}'; "
            "remove them"
        )
    defaults = ModalitySettings(modality.kind, modality.column)
    for name, readers in SETTING_READERS.items() if modality.kind in MODALITY_KINDS else ():
        is_set = getattr(modality, name) != getattr(defaults, name)
        if is_set and modality.kind not in readers:
            raise ValueError(
                f"{where}: kind {modality.kind} does not read {name}; remove it, or change "
                f"`kind` (it is read by: {', '.join(readers)})"
            )
    return make_part(setting, modality.kind, MODALITY_KINDS, ModalityKind, where, modality)


def make_kinds(modalities: Mapping[str, ModalitySettings]) -> dict[str, ModalityKind]:
    """Return the kind of each modality, by its name."""
    return {name: make_kind(f"content.modalities.{name}", m) for name, m in modalities.items()}
