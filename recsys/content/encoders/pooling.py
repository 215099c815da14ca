"""Pools the hidden states of an encoder into the tokens of an item.

Shapes: U unique items, T tokens, D width of the encoder.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from recsys.data.items.content_input import ContentInput

Pooling = Literal["mean", "cls", "last", "none", "projected"]


def mean_token(
    tokens: Tensor,  # [U, T, D]
    mask: Tensor,  # [U, T]
) -> Tensor:  # [U, D], zero for an item without tokens
    """Return the mean of the tokens that the mask keeps."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def last_place(mask: Tensor) -> Tensor:  # [U, T] -> [U]
    """Return the index of the last token; 0 for an item without tokens."""
    return (mask.sum(dim=1) - 1).clamp(min=0)


def pool(
    hidden: Tensor,  # [U, T, D]
    mask: Tensor,  # [U, T]
    pooling: Pooling,
) -> ContentInput:  # values [U, T or 1, D], mask [U, T or 1]
    """Return all tokens (`none`) or one: the first (`cls`), the last, or the mean of all."""
    if pooling == "none":
        return ContentInput(hidden, mask)
    if pooling == "cls":
        token = hidden[:, 0]
    elif pooling == "last":
        token = hidden[torch.arange(len(hidden), device=hidden.device), last_place(mask)]
    else:
        token = mean_token(hidden, mask)
    return ContentInput(token.unsqueeze(1), mask.any(dim=1, keepdim=True))
