"""Target attention (DIN, Zhou et al. 2018, arXiv 1706.06978): the history as the target sees it.

Parallel lists of the history (liked flags, time gaps) are mapped and added to the items they
belong to, so that attention can tell a liked item from a disliked one.

Shapes: B batch, L longest history, N history items of the batch, D dimension, P parallel lists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pad_history(
    values: Tensor,  # [N, D]
    parallel: Tensor,  # [N, P]
    lengths: Tensor,  # [B]
) -> tuple[Tensor, Tensor, Tensor]:  # [B, L, D], [B, L, P], [B, L]
    """Jagged history -> padded with zeros, and the mask of what is there; L is at least 1."""
    longest = max(int(lengths.max()), 1)
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    joined = torch.cat([values, parallel], dim=1)
    padded = torch.ops.fbgemm.jagged_to_padded_dense(joined, [offsets], [longest])
    mask = torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]
    return padded[..., : values.shape[1]], padded[..., values.shape[1] :], mask


class TargetAttention(nn.Module):
    """Weights history items by an MLP of (item, target, difference, product) and sums them.

    Output: the weighted sum [D], the mean of the parallel lists [P], and log(1 + length) [1].
    """

    def __init__(self, dim: int, num_parallel: int, units: list[int]) -> None:
        super().__init__()
        self.parallel_map = nn.Linear(num_parallel, dim, bias=False) if num_parallel else None
        layers: list[nn.Module] = []
        width = 4 * dim
        for unit in units:
            layers += [nn.Linear(width, unit), nn.ReLU()]
            width = unit
        self.score = nn.Sequential(*layers, nn.Linear(width, 1))
        self.output_dim = dim + num_parallel + 1

    def forward(
        self,
        target: Tensor,  # [B, D]
        history: Tensor,  # [B, L, D]
        parallel: Tensor,  # [B, L, P]
        mask: Tensor,  # [B, L]
    ) -> Tensor:  # [B, D + P + 1]
        if self.parallel_map is not None:
            history = history + self.parallel_map(parallel)
        query = target.unsqueeze(1).expand_as(history)
        pairs = torch.cat([history, query, history - query, history * query], dim=-1)
        weights = torch.softmax(self.score(pairs).squeeze(-1).masked_fill(~mask, -1e4), dim=1)
        weights = weights * mask  # an empty history gives zero
        interest = torch.einsum("bl,bld->bd", weights, history)
        lengths = mask.sum(dim=1, keepdim=True)
        mean = (parallel * mask.unsqueeze(-1)).sum(dim=1) / lengths.clamp(min=1)
        return torch.cat([interest, mean, torch.log1p(lengths.to(interest.dtype))], dim=1)
