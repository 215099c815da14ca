"""Kinds `image` and `frames`: encoded images, one or a list per item, decoded to square pixels.

Shapes: n rows of a chunk, U unique items, I images per item, S `image_size`.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recsys.config.named_parts import make_part
from recsys.data.items.images import ImagePreparation, check_first_image, decoded_images, num_images
from recsys.data.items.item_table import ItemColumnReader, digest_of
from recsys.data.items.kind import ModalityKind
from recsys.data.parquet.bad_rows import Report

if TYPE_CHECKING:
    from recsys.content.encoders.base import Encoder
    from recsys.content.encoders.pretrained import PretrainedEncoder
    from recsys.data.items.kind import ContentInput


logger = logging.getLogger(__name__)


class Image(ModalityKind):
    """Images: an entry is an image; the first `max_images` of each item are used."""

    column_kind = "image"
    dtype = "uint8"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entry_shape = (3, self.modality.image_size, self.modality.image_size)
        self.num_cut = 0  # items with more images

    def check(self) -> None:
        if bool(self.modality.encoder) == bool(self.modality.module):
            raise ValueError(
                f"{self.where}: kind image needs one of `encoder` and `module`; set exactly one"
            )
        if self.modality.module and self.modality.revision:
            raise ValueError(f"{self.where}: revision is of `encoder`, not `module`; remove it")

    def check_column(self, column: ItemColumnReader) -> None:
        chunks = ((chunk, where) for chunk, where, _ in column.chunks())
        check_first_image(chunks, decodes=not column.skips_bad_rows)

    @property
    def is_multi_image(self) -> bool:
        return self.modality.max_images > 1

    @cached_property
    def pretrained(self) -> PretrainedEncoder | None:
        from recsys.content.encoders.pretrained import PretrainedEncoder

        if not self.modality.encoder:
            return None
        return PretrainedEncoder(self.modality.encoder, self.modality.revision, self.where)

    @cached_property
    def preparation(self) -> ImagePreparation:
        if self.pretrained is None:
            return ImagePreparation()
        preparation = self.pretrained.images
        self.notes += self.pretrained.notes
        return preparation

    def key(self) -> Any:
        return self.modality.image_size, self.modality.max_images, self.preparation, "upright"

    def image_indices(self, count: int) -> list[int]:
        return list(range(min(count, self.modality.max_images)))

    def entries(self, chunk: pa.Array, where: str, report: Report) -> tuple[np.ndarray, np.ndarray]:
        lengths, pixels, cut = decoded_images(
            chunk, self.modality.image_size, self.image_indices, self.preparation, where, report
        )
        self.num_cut += cut
        return lengths, pixels

    def lengths(self, chunk: pa.Array, where: str) -> np.ndarray:  # [n]
        return num_images(chunk, where).clip(max=self.modality.max_images)

    def write(self, column: ItemColumnReader, folder: Path) -> int:
        num_entries, limit = super().write(column, folder), self.modality.max_images
        if self.num_cut:
            logger.info(
                f"column '{column.name}': {self.num_cut:,} items have more than max_images {limit} "
                f"images; {self.describe_used_images()}"
            )
        return num_entries

    def describe_used_images(self) -> str:
        return f"the first {self.modality.max_images} of each are used"

    def as_input(self, values: np.ndarray, mask: np.ndarray) -> ContentInput:  # mask [U, I]
        # uint8 [U, I, 3, S, S], or tokens of the encoder's frozen part.
        if not self.is_multi_image and values.dtype == np.uint8:
            values = values[:, 0]
        return super().as_input(values, mask)

    def encoder(self, entry_shape: tuple[int, ...]) -> Encoder:
        from torch import nn

        from recsys.content.encoders import image_encoders
        from recsys.content.encoders.identity import EncoderIdentity, weights_digest

        encoder: Encoder
        modality = self.modality
        if self.pretrained is not None:
            load = image_encoders.ImageTransformer.load
            encoder = load(self.pretrained, modality, self.where, self.preparation)
        else:
            assert modality.module is not None
            module = make_part(f"{self.where}: module", modality.module, {}, nn.Module)
            trains = modality.training == "full"
            encoder = image_encoders.ModuleEncoder(module, trains, modality.image_size)
            encoder.identity = EncoderIdentity(modality.module, None, weights_digest(module))
        return image_encoders.MultiImageEncoder(encoder) if self.is_multi_image else encoder

    def preparation_digest(self) -> str:
        return digest_of(self.preparation)


class Frames(Image):
    """Videos as lists of frames; `max_images` of them are used, evenly spaced and in order."""

    is_multi_image = True

    def image_indices(self, count: int) -> list[int]:
        """Return the indices in the middle of `max_images` equal parts of the video."""
        limit = self.modality.max_images
        if count <= limit:
            return list(range(count))
        return [int(index) for index in (np.arange(limit) + 0.5) * count / limit]

    def describe_used_images(self) -> str:
        return f"{self.modality.max_images} of each are used, evenly over its length"
