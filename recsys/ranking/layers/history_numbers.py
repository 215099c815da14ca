"""Computes numbers of a history from its length and parallel lists; recent items weigh more.

A user's taste changes, and the latest items of a liked list predict more than the first. Each of
several means halves an item's weight after a fixed number of newer items (its half-life), so that
the model learns which rate fits.

Shapes: B batch, N history items of the batch, P parallel lists, H half-lives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.data.jagged_history import JaggedHistory

HALF_LIVES = (1.0, 3.0, 10.0)  # in newer items


def history_numbers(
    history: JaggedHistory, parallel: Tensor
) -> Tensor:  # [N, P] -> [B, P * (1 + H) + 1]
    """Return the mean of each parallel list, its means by each half-life, and log(1 + length).

    All are 0 for an empty history.
    """
    lengths = history.lengths.unsqueeze(1)
    half_lives = torch.tensor(HALF_LIVES, device=lengths.device)
    # Denormal weights of very old items would be slow, so they are clamped.
    weights = torch.exp2(-history.ages.unsqueeze(1) / half_lives).clamp(min=1e-30)  # [N, H]
    weights = torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1)
    weighted = (parallel.unsqueeze(2) * weights.unsqueeze(1)).flatten(1)  # [N, P * (1 + H)]
    totals = history.sum(weights).clamp(min=1)  # only an empty history has less than 1
    means = history.sum(weighted).view(lengths.shape[0], parallel.shape[1], weights.shape[1])
    means = (means / totals.unsqueeze(1)).flatten(1)
    return torch.cat([means, torch.log1p(lengths.to(means.dtype))], dim=1)


def num_history_numbers(num_parallel: int) -> int:
    """Return the number of columns of `history_numbers`."""
    return num_parallel * (1 + len(HALF_LIVES)) + 1
