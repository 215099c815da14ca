"""The interface of all encoders: content of the unique items -> tokens for the fusion.

Every encoder splits into a frozen part, `frozen(input)`, which gives the same output for an item
at every step and may therefore be cached on disk, and `forward(input)`, which runs what is left.
A fully frozen encoder is frozen altogether and a fully trained one not at all.

Shapes: U unique items, T tokens, D width of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from recsys.batch import ContentInput
from recsys.content.frozen_groups import run_in_groups

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, red green blue, on the scale 0 to 1
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CacheReport:
    """Where the outputs of a frozen part are, and what it took to get them.

    items: that have content; encoded: of these, by all ranks in this job and not found;
    seconds: of finding, encoding and putting together.
    """

    folder: Path
    items: int
    num_bytes: int
    encoded: int
    seconds: float


class Encoder(nn.Module):
    """Interface of all encoders.

    Attributes:
        output_dim: D of the tokens.
        caches: whether `frozen` is worth caching, that is, whether it does anything.
        is_cached: batches already carry the outputs of `frozen`.
        cache_report: of that cache, if any.
        max_length: the most tokens a text may have; 1 for images.
    """

    output_dim: int
    caches: bool
    max_length: int = 1
    is_cached: bool = False
    cache_report: CacheReport | None = None

    def encode(self, content: ContentInput) -> ContentInput:
        """Both parts: content of a batch -> tokens [U, T, D] and their mask [U, T]."""
        if self.caches and not self.is_cached:
            content = self.frozen_outputs(content)
        return cast(ContentInput, self(content))

    @torch.no_grad()
    def frozen_outputs(self, content: ContentInput) -> ContentInput:
        """The outputs of `frozen`, for each item the same bits whatever it is batched with."""
        return run_in_groups(self.frozen, content, self.max_length, self.output_dim)

    def drop_frozen_layers(self) -> None:
        """Frees what `frozen` needs, once its outputs come from a cache."""
        self.is_cached = True

    def frozen(self, content: ContentInput) -> ContentInput:
        """The part that never changes; the identity where there is none."""
        return content

    def forward(self, content: ContentInput) -> ContentInput:
        """What is left after `frozen`: tokens [U, T, D] and their mask [U, T]."""
        raise TypeError(f"{type(self).__name__} defines no forward")


def normalize_pixels(pixels: Tensor) -> Tensor:
    """uint8 [U, 3, H, W] -> float, normalised as ImageNet encoders expect."""
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def mean_token(
    tokens: Tensor,  # [U, T, D]
    mask: Tensor,  # [U, T]
) -> Tensor:  # [U, D], zero for an item without tokens
    """The mean of the tokens that are there."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
