"""Kind `image`: encoded images, one or a list of them per item, decoded to square pixels."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from recsys.config.named_parts import make_part
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.identity import EncoderIdentity, weights_digest
from recsys.content.encoders.image_transformer import ImageTransformer
from recsys.content.encoders.module_encoder import ModuleEncoder
from recsys.content.encoders.pretrained import PretrainedEncoder
from recsys.content.encoders.several_images import SeveralImages
from recsys.data.batch import ContentInput
from recsys.data.items.images import ImagePreparation
from recsys.data.items.item_column import ItemColumnReader
from recsys.data.items.item_images import decoded_images, num_images
from recsys.data.items.item_table import digest_of
from recsys.data.items.kind import ModalityKind
from recsys.data.parquet.bad_rows import Report

logger = logging.getLogger(__name__)


class Image(ModalityKind):
    """An entry is an image; the first `max_images` of each item."""

    column_kind = "image"
    dtype = "uint8"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entry_shape = (3, self.modality.image_size, self.modality.image_size)
        self.num_cut = 0  # items with more images

    def check(self) -> None:
        if bool(self.modality.encoder) == bool(self.modality.module):
            raise ValueError(
                f"{self.where}: an image needs either `encoder` or `module`, and not both"
            )

    @property
    def has_several(self) -> bool:
        return self.modality.max_images > 1

    @cached_property
    def pretrained(self) -> PretrainedEncoder | None:
        """The encoder's checkpoint; None for a `module`."""
        if not self.modality.encoder:
            return None
        return PretrainedEncoder(self.modality.encoder, self.modality.revision, self.where)

    @cached_property
    def preparation(self) -> ImagePreparation:
        """The treatment of images that the checkpoint asks for."""
        if self.pretrained is None:
            return ImagePreparation()
        preparation = self.pretrained.images
        self.notes += self.pretrained.notes
        return preparation

    def key(self) -> Any:
        return self.modality.image_size, self.modality.max_images, self.preparation

    def chosen(self, count: int) -> list[int]:
        """Returns which of an item's images are used, in order."""
        return list(range(min(count, self.modality.max_images)))

    def entries(self, chunk: pa.Array, where: str, report: Report) -> tuple[np.ndarray, np.ndarray]:
        size = self.modality.image_size
        lengths, pixels, cut = decoded_images(
            chunk, size, self.chosen, self.preparation, where, report
        )
        self.num_cut += cut
        return lengths, pixels

    def lengths(self, chunk: pa.Array, where: str) -> np.ndarray:
        return num_images(chunk, where).clip(max=self.modality.max_images)

    def write(self, column: ItemColumnReader, folder: Path) -> int:
        num_entries, most = super().write(column, folder), self.modality.max_images
        if self.num_cut:
            logger.info(
                f"column '{column.name}': {self.num_cut:,} items have more than max_images {most} "
                f"images; {self.which_are_used()}"
            )
        return num_entries

    def which_are_used(self) -> str:
        """Says which images of an item with too many are used."""
        return f"the first {self.modality.max_images} of each are used"

    def as_input(self, values: np.ndarray, mask: np.ndarray) -> ContentInput:
        if not self.has_several and values.dtype == np.uint8:  # a single one is no list of one
            values = values[:, 0]
        return super().as_input(values, mask)

    def encoder(self, entry_shape: tuple[int, ...]) -> Encoder:
        encoder = self._single()
        return SeveralImages(encoder) if self.has_several else encoder

    def _single(self) -> Encoder:
        modality = self.modality
        if self.pretrained is not None:
            return ImageTransformer.load(self.pretrained, modality, self.where, self.preparation)
        assert modality.module is not None
        module = make_part(f"{self.where}: module", modality.module, {}, nn.Module)  # type: ignore[type-abstract]
        encoder = ModuleEncoder(module, modality.training == "full", modality.image_size)
        encoder.identity = EncoderIdentity(modality.module, None, weights_digest(module))
        return encoder

    def preparation_digest(self) -> str:
        return digest_of(self.preparation)
