"""The interface of all encoders, which map the content of unique items to tokens for the fusion.

Every encoder splits into a frozen part, `frozen(input)`, which gives the same output for an item
at every step and may therefore be cached on disk, and `forward(input)`, which runs the other
layers. For a frozen encoder `forward` is the identity; for a fully trained one `frozen` is.

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
from recsys.data.items.content_input import ContentInput
from recsys.data.items.images import ImagePreparation


@dataclass(frozen=True)
class CacheReport:
    """Report on the cache of a frozen part.

    folder, num_bytes: location and size; items: number of items with content; encoded: number of
    items encoded by all ranks in this job; seconds: time to look up, encode and write.
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
        frozen_dim: D of the outputs of `frozen`.
        frozen_tokens: number of tokens that `frozen` returns for one image.
        frozen_dtype: type of the outputs of `frozen`: float16 if an item has several final tokens.
        caches: whether `frozen` computes anything, so that caching pays.
        is_cached: whether batches already carry the outputs of `frozen`.
        cache_report: report on that cache, if any.
        max_length: maximum number of tokens of a text; 1 for images.
        identity: origin of its weights; None if it has none.
        rewritten: names of frozen parameters that differ from the loaded ones.
        notes: sentences for the user.

    Example::

        from recsys.content.encoders.build import Encoder
        from recsys.data.batch import ContentInput

        class Doubled(Encoder):
            def __init__(self):
                super().__init__()
                self.output_dim, self.caches = 4, False

            def forward(self, content):  # values [U, T, 4]
                return ContentInput(2 * content.values, content.mask)
    """

    output_dim: int
    frozen_tokens: int = 1
    frozen_dtype: torch.dtype = torch.float32
    caches: bool
    max_length: int = 1
    is_cached: bool = False
    cache_report: CacheReport | None = None
    identity: EncoderIdentity | None = None

    def __init__(self) -> None:
        """Create the empty notes; subclasses set `output_dim` and `caches`."""
        super().__init__()
        self.rewritten: set[str] = set()
        self.notes: list[str] = []
        self._frozen_dim: int | None = None

    @property
    def frozen_dim(self) -> int:
        """Width of the outputs of `frozen`; default: `output_dim`."""
        return self.output_dim if self._frozen_dim is None else self._frozen_dim

    @frozen_dim.setter
    def frozen_dim(self, width: int) -> None:
        self._frozen_dim = width

    @property
    def trained_parts(self) -> list[nn.Module]:
        """Modules that gradients pass and that run in every step."""
        return []

    @property
    def frozen_layers(self) -> str:
        """Description of the layers that `frozen` runs."""
        return "all"

    def frozen_settings(self) -> Any:
        """Return all settings that determine the outputs of `frozen`, in printable form."""
        return None

    def encode(self, content: ContentInput) -> ContentInput:
        """Run both parts: content of a batch -> tokens [U, T, D] and their mask [U, T]."""
        if self.caches and not self.is_cached:
            content = self.frozen_outputs(content)
        return cast(ContentInput, self(content))

    @torch.no_grad()
    def frozen_outputs(self, content: ContentInput) -> ContentInput:
        """Return the outputs of `frozen` [U, T, D]; an item's bits do not depend on its batch.

        Raises:
            ValueError: an output is too large for `frozen_dtype`.
        """
        outputs = run_in_groups(self.frozen, content, self.max_length, self.frozen_dim)
        values = outputs.values.to(self.frozen_dtype)
        if self.frozen_dtype == torch.float16 and not values.isfinite().all():
            name = type(self).__name__ if self.identity is None else self.identity.name
            raise ValueError(
                f"encoder '{name}': a token has the value {float(outputs.values.abs().max()):.3g}, "
                "and tokens are kept in float16, up to 65504; use a `pooling` with one token"
            )
        return ContentInput(values, outputs.mask)

    def drop_frozen_layers(self) -> None:
        """Free the layers that `frozen` needs, once its outputs come from a cache."""
        self.is_cached = True

    def frozen(self, content: ContentInput) -> ContentInput:
        """Run the frozen part, whose output never changes; the identity if there is none."""
        return content

    def forward(self, content: ContentInput) -> ContentInput:
        """Run the layers above `frozen` and return tokens [U, T, D] and their mask [U, T]."""
        raise TypeError(f"{type(self).__name__} defines no forward")


def normalize_pixels(
    pixels: Tensor, preparation: ImagePreparation
) -> Tensor:  # uint8 [U, 3, H, W] -> float32 [U, 3, H, W]
    """Return the pixels normalised as the encoder expects."""
    mean = torch.tensor(preparation.mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(preparation.std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std
