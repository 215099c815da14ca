"""Modality kinds, each of which reads, stores and encodes one kind of item content.

`content.modalities.NAME.kind` names a kind of the package, or a class of your own as
`package.module:Class`: a subclass of `ModalityKind` with two or three class attributes and five
methods, `check`, `key`, `entries`, `as_input` and `encoder`, of which only `entries` and `encoder`
have no default. `recsys/content/README.md` has a complete one.

Shapes: n rows of a chunk, U unique items, T entries of the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recsys.config import ModalitySettings
from recsys.config.named_parts import make_part
from recsys.data.items.item_column import ItemColumnReader
from recsys.data.items.item_table import digest_of
from recsys.data.items.ragged_array import RaggedWriter
from recsys.data.parquet.bad_rows import Report

if TYPE_CHECKING:  # the check of settings does without torch
    from torch import nn

    from recsys.data.items.content_input import ContentInput

MODALITY_KINDS = {
    "text": "recsys.content.kinds.text:Text",
    "image": "recsys.content.kinds.image:Image",
    "feature": "recsys.content.kinds.feature:Feature",
    "frames": "recsys.content.kinds.image:Frames",
}


class ModalityKind:
    """Interface of all modality kinds.

    Args:
        where: full name of the settings, for messages.
        modality: the settings.

    Attributes:
        column_kind: kind of the item columns in schema.yaml that it reads.
        entry_shape, dtype: shape and type of one entry of an item's row in the cache.
        notes: sentences for the user, set when the encoder is built.
    """

    column_kind: str
    entry_shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def __init__(self, where: str, modality: ModalitySettings) -> None:
        """Keep the settings and check them."""
        self.where, self.modality = where, modality
        self.notes: list[str] = []
        self.check()

    def __reduce__(self) -> Any:
        """Pickle only the settings: another process rebuilds the kind and its tokenizer."""
        return make_kind, (self.where, self.modality)

    def check(self) -> None:
        """Raise a ValueError that names settings that do not fit this kind."""
        if self.modality.max_images > 1:
            raise ValueError(
                f"{self.where}: max_images is of kind image, not {self.modality.kind}; remove it"
            )

    def check_column(self, column: ItemColumnReader) -> None:
        """Raise a ValueError if the column's first content is of another kind.

        It is called before all content is prepared, which may take long.
        """

    def key(self) -> Any:
        """Return, in printable form, all that entries depend on besides the column's content."""
        return self.modality.options or None

    def entries(
        self, chunk: pa.Array, where: str, report: Report
    ) -> tuple[np.ndarray, np.ndarray]:  # [n], [sum of them, *entry_shape]
        """Return the number of entries of each row of a chunk, and all entries in order.

        Args:
            chunk: values of the column.
            where: file and column, for messages.
            report: reports unusable rows; they have no entries.

        Raises:
            ValueError: the column has another type.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no entries")

    def as_input(
        self, values: np.ndarray, mask: np.ndarray
    ) -> ContentInput:  # values [U, T, *entry_shape], mask [U, T]
        """Return padded rows, or outputs of the frozen part, in the form that the encoder takes."""
        import torch

        from recsys.data.items.content_input import ContentInput

        return ContentInput(torch.from_numpy(values), torch.from_numpy(mask))

    def encoder(self, entry_shape: tuple[int, ...]) -> nn.Module:
        """Return the encoder, a `recsys.content.encoders.base.Encoder`.

        Args:
            entry_shape: shape of the cached entries.

        Raises:
            ValueError: it cannot be loaded, or does not fit its settings.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no encoder")

    def preparation_digest(self) -> str:
        """Return a hash of the preparation of content before the encoder.

        Scoring refuses a run whose encoder was trained with another preparation.
        """
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
    """Return the kind that a modality's settings name; its constructor checks them.

    Raises:
        ValueError: it is unknown, cannot be made, or refuses the settings.
    """
    setting = f"{where}.kind"
    if modality.options and modality.kind in MODALITY_KINDS:
        raise ValueError(
            f"{where}.options are for a class of your own, but {setting} is '{modality.kind}'; "
            "remove them"
        )
    return make_part(setting, modality.kind, MODALITY_KINDS, ModalityKind, where, modality)  # type: ignore[type-abstract]


def make_kinds(modalities: Mapping[str, ModalitySettings]) -> dict[str, ModalityKind]:
    """Return the kind of each modality, by its name."""
    return {name: make_kind(f"content.modalities.{name}", m) for name, m in modalities.items()}
