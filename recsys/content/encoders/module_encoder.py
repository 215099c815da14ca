"""Encoders that are no transformer: stored features, and any torch module over pixels.

Shapes: U unique items, T tokens, D width of the encoder, H and W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recsys.content.encoders.base import Encoder, normalize_pixels
from recsys.data.items.content_input import ContentInput
from recsys.data.items.images import ImagePreparation


class StoredFeatures(Encoder):
    """Encoder of stored features, which are tokens already: [U, 1, D] -> [U, 1, D].

    Example::

        from recsys.content.encoders.build import StoredFeatures

        assert StoredFeatures(output_dim=6).frozen_dim == 6
    """

    def __init__(self, output_dim: int) -> None:
        """Keep the width D of the features."""
        super().__init__()
        self.output_dim = output_dim
        self.caches = False

    def forward(self, content: ContentInput) -> ContentInput:
        """Return the features unchanged."""
        return content


class ModuleEncoder(Encoder):
    """Any torch module over pixels: [U, 3, H, W] -> [U, D] or [U, T, D], frozen or trained.

    Raises:
        ValueError: the module's output has another shape.

    Example::

        from torch import nn

        from recsys.content.encoders.build import ModuleEncoder

        module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
        encoder = ModuleEncoder(module, trained=True, image_size=8)
        assert encoder.output_dim == 5
    """

    def __init__(self, module: nn.Module, trained: bool, image_size: int) -> None:
        """Run the module once on a blank image to read the shape of its output."""
        super().__init__()
        self.module = module.requires_grad_(trained)
        self.caches = not trained
        with torch.no_grad():
            probe = module.eval()(torch.zeros(1, 3, image_size, image_size))
        if not isinstance(probe, torch.Tensor) or probe.dim() not in (2, 3):
            shape = list(probe.shape) if isinstance(probe, torch.Tensor) else type(probe).__name__
            raise ValueError(
                f"image module {type(module).__name__} gives {shape} for one image; it must give "
                "[1, D] or [1, T, D]"
            )
        self.output_dim = int(probe.shape[-1])
        self.frozen_tokens = int(probe.shape[1]) if probe.dim() == 3 else 1
        if self.caches and self.frozen_tokens > 1:
            self.frozen_dtype = torch.float16

    @property
    def trained_parts(self) -> list[nn.Module]:
        """The module, unless it is frozen."""
        return [] if self.caches else [self.module]

    def frozen_settings(self) -> Any:
        """Return the module's class and its printed structure."""
        kind = type(self.module)
        name = getattr(kind, "cache_name", f"{kind.__module__}.{kind.__qualname__}")
        return f"{name}: {self.module}"

    def train(self, mode: bool = True) -> ModuleEncoder:
        """Set the mode; a frozen module stays in eval mode."""
        super().train(mode)
        if self.caches:  # frozen: normalisation statistics must not change either
            self.module.eval()
        return self

    def drop_frozen_layers(self) -> None:
        """Free the module, whose outputs come from a cache."""
        super().drop_frozen_layers()
        self.module = nn.Identity()

    def _encode(self, content: ContentInput) -> ContentInput:
        tokens = self.module(normalize_pixels(content.values, ImagePreparation()))
        tokens = tokens.unsqueeze(1) if tokens.dim() == 2 else tokens
        return ContentInput(tokens, content.mask.expand(-1, tokens.shape[1]))

    def frozen(self, content: ContentInput) -> ContentInput:
        """Run the module if it is frozen."""
        return self._encode(content) if self.caches else content

    def forward(self, content: ContentInput) -> ContentInput:
        """Run the module if it is trained; [U, 3, H, W] -> [U, T, D]."""
        return content if self.caches else self._encode(content)
