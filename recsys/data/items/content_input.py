"""Content of items as encoders read it.

Shapes: U unique items, T tokens, D dimension of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ContentInput:
    """Content of one modality for the unique items.

    values: token ids int64 [U, T], pixels uint8 [U, 3, H, W] or features float32 [U, T, D].
    mask: bool [U, T], False for padding; [U, 1] for pixels. It has no True for an item without this
        modality.
    """

    values: Tensor
    mask: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> ContentInput:
        """Return a copy with both tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def map(self, function: Callable[[Tensor], Any]) -> ContentInput:
        """Return a copy with `function` applied to both tensors."""
        return ContentInput(function(self.values), function(self.mask))

    def __getitem__(self, items: slice) -> ContentInput:
        """Return the content of a slice of the items."""
        return ContentInput(self.values[items], self.mask[items])
