"""A `transformers` model over pixels.

Shapes: U unique items, T tokens, D width of the encoder, H and W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.config import ModalitySettings
from recsys.content.encoders.base import normalize_pixels
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.items.images import ImagePreparation


class ImageTransformer(TransformerEncoder):
    """Vision model, or vision tower of a dual encoder: [U, 3, H, W] -> [U, T or 1, D]."""

    is_text = False
    tower_name, projection_name = "vision_model", "visual_projection"
    pixels: ImagePreparation

    def _read_settings(self, modality: ModalitySettings, where: str) -> None:
        self.pixels = self.pixels or ImagePreparation()
        self.image_size = modality.image_size
        self.inputs = f"images of {self.image_size} pixels"

    def _refusal(self, error: Exception, where: str) -> str:
        size = getattr(self.config, "image_size", None)
        if isinstance(size, int) and size != self.image_size:
            return (
                f"{where}.image_size is {self.image_size}; the encoder wants {size} "
                f"({type(error).__name__}: {error})"
            )
        return super()._refusal(error, where)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Return one image [1, 3, H, W] and its mask [1, 1]."""
        device, size = self.model.device, self.image_size
        pixels = torch.arange(3 * size * size, device=device).view(1, 3, size, size)
        return pixels.to(torch.uint8), torch.ones(1, 1, dtype=torch.bool, device=device)

    def _run(self, values: Tensor, mask: Tensor) -> Any:  # uint8 [U, 3, H, W], [U, 1]
        return self.model(pixel_values=normalize_pixels(values, self.pixels))

    def _run_above_cut(self, mask: Tensor) -> Any:  # [U, T]
        shape = (len(mask), 3, self.image_size, self.image_size)
        return self.model(pixel_values=torch.zeros((), device=mask.device).expand(shape))

    def _token_mask(self, mask: Tensor, length: int) -> Tensor:  # [U, T] -> [U, length]
        return mask[:, :1].expand(-1, length)

    def _all_tokens(self, hidden: Tensor) -> Tensor:  # [U, 1 or T, D] -> [U, T, D]
        """Pad to `frozen_tokens`: a batch without any image is padded to one token only."""
        return pad(hidden, (0, 0, 0, self.frozen_tokens - hidden.shape[1]))
