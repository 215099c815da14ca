"""The interface of all encoders: content of the unique items -> tokens for the fusion.

Every encoder splits into a frozen part, `frozen(input)`, which gives the same output for an item
at every step and may therefore be cached on disk, and `forward(input)`, which runs what is left.
A fully frozen encoder is frozen altogether and a fully trained one not at all.

Shapes: U unique items, T tokens, D width of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys.content.encoders.frozen_groups import run_in_groups
from recsys.content.encoders.identity import EncoderIdentity
from recsys.data.batch import ContentInput
from recsys.data.items.images import ImagePreparation


@dataclass(frozen=True)
class CacheReport:
    """Says where the outputs of a frozen part are and how they were obtained.

    items: that have content; encoded: of these, by all ranks in this job;
    seconds: of looking up, encoding and putting together.
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
        frozen_dim: D of what `frozen` gives.
        frozen_tokens: how many tokens `frozen` gives for one image.
        caches: whether `frozen` is worth caching, that is, whether it does anything.
        is_cached: batches already carry the outputs of `frozen`.
        cache_report: of that cache, if any.
        max_length: the most tokens a text may have; 1 for images.
        identity: where its weights are from; None where it has none.
        rewritten: names of frozen parameters that are no longer those it was loaded with.
        notes: what its user should know, each a sentence.
    """

    output_dim: int
    frozen_tokens: int = 1
    caches: bool
    max_length: int = 1
    is_cached: bool = False
    cache_report: CacheReport | None = None
    identity: EncoderIdentity | None = None

    def __init__(self) -> None:
        super().__init__()
        self.rewritten: set[str] = set()
        self.notes: list[str] = []
        self._frozen_dim: int | None = None

    @property
    def frozen_dim(self) -> int:
        return self.output_dim if self._frozen_dim is None else self._frozen_dim

    @frozen_dim.setter
    def frozen_dim(self, width: int) -> None:
        self._frozen_dim = width

    @property
    def trained_parts(self) -> list[nn.Module]:
        """The modules that gradients pass, which run in every step."""
        return []

    @property
    def frozen_layers(self) -> str:
        """The layers that `frozen` runs, in words."""
        return "all"

    def frozen_settings(self) -> Any:
        """Returns all that decides on the outputs of `frozen` besides the weights; printable."""
        return None

    def encode(self, content: ContentInput) -> ContentInput:
        """Both parts: content of a batch -> tokens [U, T, D] and their mask [U, T]."""
        if self.caches and not self.is_cached:
            content = self.frozen_outputs(content)
        return cast(ContentInput, self(content))

    @torch.no_grad()
    def frozen_outputs(self, content: ContentInput) -> ContentInput:
        """The outputs of `frozen`, for each item the same bits whatever it is batched with."""
        return run_in_groups(self.frozen, content, self.max_length, self.frozen_dim)

    def drop_frozen_layers(self) -> None:
        """Frees what `frozen` needs, once its outputs come from a cache."""
        self.is_cached = True

    def frozen(self, content: ContentInput) -> ContentInput:
        """The part that never changes; the identity where there is none."""
        return content

    def forward(self, content: ContentInput) -> ContentInput:
        """Runs the layers above `frozen` and returns tokens [U, T, D] and their mask [U, T]."""
        raise TypeError(f"{type(self).__name__} defines no forward")


def normalize_pixels(
    pixels: Tensor,  # uint8 [U, 3, H, W]
    preparation: ImagePreparation,
) -> Tensor:  # float32 [U, 3, H, W]
    """Pixels as the encoder expects them."""
    mean = torch.tensor(preparation.mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(preparation.std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std
