"""Kind `feature`: stored vectors in a column or a .npy file, used as tokens directly.

Shapes: n rows of a chunk.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recsys.data.items.item_table import ItemColumnReader
from recsys.data.items.item_values import feature_tokens, usable_features
from recsys.data.items.kind import ModalityKind
from recsys.data.items.ragged_array import RaggedWriter
from recsys.data.parquet.values import list_lengths

if TYPE_CHECKING:
    from recsys.content.encoders.base import Encoder


class Feature(ModalityKind):
    """Stored features: an entry is a vector; all have the same width."""

    column_kind = "feature"

    def check(self) -> None:
        if self.modality.encoder or self.modality.module:
            raise ValueError(
                f"{self.where}: a stored feature takes no encoder; remove it or change `kind`"
            )
        if self.modality.training != "frozen":
            raise ValueError(
                f"{self.where}: a stored feature is `training: frozen`, not "
                f"{self.modality.training}"
            )
        super().check()

    def lengths(self, chunk: pa.Array, where: str) -> np.ndarray:  # [n]
        return feature_tokens(chunk, where)[0]

    def write(self, column: ItemColumnReader, folder: Path) -> int:
        if (feature_file := column.feature_file()) is not None:
            return column.write_features(folder, *feature_file)
        width = self._width(column)
        with closing(RaggedWriter(folder, (width,), self.dtype)) as writer:
            for chunk, where, report in column.chunks():
                writer.add(*usable_features(*feature_tokens(chunk, where), width, report))
        return writer.num_entries

    def _width(self, column: ItemColumnReader) -> int:
        if self.entry_shape:
            return self.entry_shape[0]
        for chunk, where, _ in column.chunks():
            widths = list_lengths(feature_tokens(chunk, where)[1])
            if len(widths):
                return int(np.bincount(widths).argmax() if column.skips_bad_rows else widths[0])
        raise column.empty()

    def encoder(self, entry_shape: tuple[int, ...]) -> Encoder:
        from recsys.content.encoders.base import StoredFeatures

        (width,) = entry_shape
        return StoredFeatures(width)
