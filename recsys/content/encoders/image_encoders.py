"""Encoders of images: transformers models, any torch module over pixels, several images per item.

Shapes: U unique items, I most images of an item, N images, T tokens, D width, H and W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from recsys.config import ModalitySettings
from recsys.content.encoders.base import Encoder, normalize_pixels
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.items.images import ImagePreparation
from recsys.data.items.kind import ContentInput


class ImageTransformer(TransformerEncoder):
    """Vision model, or vision tower of a dual encoder: [U, 3, H, W] -> [U, T or 1, D]."""

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


class ModuleEncoder(Encoder):
    """Any torch module over pixels: [U, 3, H, W] -> [U, D] or [U, T, D], frozen or trained."""

    def __init__(self, module: nn.Module, trained: bool, image_size: int) -> None:
        super().__init__()
        self.module = module.requires_grad_(trained)
        self.caches = not trained
        with torch.no_grad():
            probe = module.eval()(torch.zeros(1, 3, image_size, image_size))
        if not isinstance(probe, Tensor) or probe.dim() not in (2, 3):
            shape = list(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
            raise ValueError(
                f"image module {type(module).__name__} gives {shape} for one image; it must give "
                "[1, D] or [1, T, D]"
            )
        self.output_dim = int(probe.shape[-1])
        self.frozen_tokens = int(probe.shape[1]) if probe.dim() == 3 else 1
        if self.caches and self.frozen_tokens > 1:
            self.frozen_dtype = torch.float16

    @property
    def trained_modules(self) -> list[nn.Module]:
        return [] if self.caches else [self.module]

    def frozen_settings(self) -> Any:
        cls = type(self.module)
        name = getattr(cls, "cache_name", f"{cls.__module__}.{cls.__qualname__}")
        return f"{name}: {self.module}"

    def train(self, mode: bool = True) -> ModuleEncoder:
        super().train(mode)
        if self.caches:  # frozen: normalisation statistics must not change either
            self.module.eval()
        return self

    def drop_frozen_layers(self) -> None:
        super().drop_frozen_layers()
        self.module = nn.Identity()

    def _encode(self, content: ContentInput) -> ContentInput:
        tokens = self.module(normalize_pixels(content.values, ImagePreparation()))
        tokens = tokens.unsqueeze(1) if tokens.dim() == 2 else tokens
        return ContentInput(tokens, content.mask.expand(-1, tokens.shape[1]))

    def frozen(self, content: ContentInput) -> ContentInput:
        return self._encode(content) if self.caches else content

    def forward(self, content: ContentInput) -> ContentInput:  # [U, 3, H, W] -> [U, T, D]
        return content if self.caches else self._encode(content)


class MultiImageEncoder(Encoder):
    """Image encoder over pixels uint8 [U, I, 3, H, W] with mask [U, I] -> tokens [U, I * T, D].

    `encoder` maps [N, 3, H, W] -> [N, T, D]. An item's images come first in its mask.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.output_dim, self.frozen_dim = encoder.output_dim, encoder.frozen_dim
        self.frozen_dtype, self.frozen_tokens = encoder.frozen_dtype, encoder.frozen_tokens
        self.caches, self.identity, self.notes = encoder.caches, encoder.identity, encoder.notes

    @property
    def trained_modules(self) -> list[nn.Module]:
        return self.encoder.trained_modules

    def frozen_settings(self) -> Any:
        return self.encoder.frozen_settings()

    def drop_frozen_layers(self) -> None:
        super().drop_frozen_layers()
        self.encoder.drop_frozen_layers()

    def frozen_outputs(self, content: ContentInput) -> ContentInput:  # [U, I * T, D]
        is_encoded = _encoded_images(content.mask)
        return _by_item(self.encoder.frozen_outputs(_images(content, is_encoded)), is_encoded)

    def forward(self, content: ContentInput) -> ContentInput:  # tokens [U, I * T, D]
        if not self.trained_modules:
            return content
        if self.caches:  # tokens of all images, concatenated
            size = self.encoder.frozen_tokens
            missing = -content.mask.shape[1] % size  # if no item of a batch has an image
            values = pad(content.values, (0, 0, 0, missing))
            mask = pad(content.mask, (0, missing)).unflatten(1, (-1, size))  # [U, I, T]
            is_encoded = _encoded_images(mask[:, :, 0])
            images = ContentInput(values.unflatten(1, (-1, size))[is_encoded], mask[is_encoded])
        else:
            is_encoded = _encoded_images(content.mask)
            images = _images(content, is_encoded)
        return _by_item(self.encoder(images), is_encoded)


def _encoded_images(mask: Tensor) -> Tensor:  # [U, I] -> [U, I]
    """Return the mask of images to encode; the first of each item is always one of them."""
    is_encoded = mask.clone()
    is_encoded[:, 0] = True
    return is_encoded


def _images(content: ContentInput, is_encoded: Tensor) -> ContentInput:  # [U, I]
    return ContentInput(content.values[is_encoded], content.mask[is_encoded].unsqueeze(1))


def _by_item(images: ContentInput, is_encoded: Tensor) -> ContentInput:  # [U, I]
    values = images.values.new_zeros(*is_encoded.shape, *images.values.shape[1:])
    mask = images.mask.new_zeros(*is_encoded.shape, images.mask.shape[1])
    values[is_encoded], mask[is_encoded] = images.values, images.mask
    return ContentInput(values.flatten(1, 2), mask.flatten(1, 2))
