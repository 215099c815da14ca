"""The user's content interest: target attention and similarities over the history's content.

The history's vectors come through the history map of `recsys.content.history`. The similarity
features are SimTier's idea (arXiv 2407.19467), split by whether the user liked the item.

Shapes: B batch, L longest history, N history items of the batch, D dimension, M modalities,
P parallel lists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import HistorySettings
from recsys.ranking.target_attention import TargetAttention, pad_history
from recsys.vectors import ContentVectors


def similarity_features(
    target: Tensor,  # [B, D]
    history: Tensor,  # [B, L, D]
    mask: Tensor,  # [B, L]
    flags: Tensor,  # [B, L, P], such as liked (1) or not (0)
) -> Tensor:  # [B, S], S = 2 * G + P with G = 1 + 2 * P groups of history items
    """Cosine of the target to groups of history items: mean, maximum, and what it votes for.

    The groups are all items, those with each flag, and those without it; a list of other numbers
    is split at 0.5. The features are G means, G maxima and, per list, its mean weighted by
    softmax(cosine / 0.1): what the user thought of items like the target. A group without items,
    and the votes of an empty history, give 0.
    """
    cosine = torch.einsum("bd,bld->bl", F.normalize(target, dim=-1), F.normalize(history, dim=-1))
    flagged = flags > 0.5
    groups = torch.cat([torch.ones_like(mask).unsqueeze(-1), flagged, ~flagged], dim=-1)
    groups = (groups & mask.unsqueeze(-1)).to(cosine.dtype)  # [B, L, G]
    count = groups.sum(dim=1)  # [B, G]
    mean = (groups * cosine.unsqueeze(-1)).sum(1) / count.clamp(min=1)
    masked = torch.where(groups > 0, cosine.unsqueeze(-1), -1.0)
    maximum = torch.where(count > 0, masked.amax(dim=1), 0.0)
    weights = torch.softmax((cosine / 0.1).masked_fill(~mask, -1e4), dim=1) * mask
    votes = torch.einsum("bl,blp->bp", weights, flags)
    return torch.cat([mean, maximum, votes], dim=1)


def num_similarity_features(num_flags: int) -> int:
    """S of `similarity_features`."""
    return 2 * (1 + 2 * num_flags) + num_flags


class ContentInterest(nn.Module):
    """Target attention over the history's content, with similarity features beside it.

    The similarities are those of the content vectors and of each modality's mean tokens.
    """

    def __init__(
        self,
        dim: int,
        num_modalities: int,
        num_parallel: int,
        attention_units: list[int],
        settings: HistorySettings,
    ) -> None:
        super().__init__()
        self.attention = TargetAttention(dim, num_parallel, attention_units)
        self.uses_similarity = settings.similarity_features
        self.output_dim = self.attention.output_dim
        if self.uses_similarity:
            self.output_dim += (1 + num_modalities) * num_similarity_features(num_parallel)

    def forward(
        self,
        content: ContentVectors,
        parallel: Tensor,  # [N, P]
        lengths: Tensor,  # [B]
    ) -> Tensor:  # [B, output_dim]
        dim = content.target.shape[1]
        kept = torch.cat([content.history, content.history_modalities.flatten(1)], dim=1)
        padded, flags, mask = pad_history(kept, parallel, lengths)
        spaces = padded.split(dim, dim=-1)  # 1 + M of [B, L, D]
        interest = self.attention(content.target, spaces[0], flags, mask)
        if not self.uses_similarity:
            return interest
        targets = [content.target, *content.target_modalities.unbind(dim=1)]
        similarities = [
            similarity_features(target, history, mask, flags)
            for target, history in zip(targets, spaces, strict=True)
        ]
        return torch.cat([interest, *similarities], dim=1)
