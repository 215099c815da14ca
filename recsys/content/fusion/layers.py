"""The layers of the Fusion-Q-Former: joint self-attention of an item's few tokens.

Shapes: U unique items, T tokens with the queries, Q tokens with outputs, D dimension, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.host import is_on_host
from recsys.content.dropout import Dropout
from recsys.kernels import has_native, native_few_token_attention

FEW_TOKENS = 8


class JointSelfAttention(nn.Module):
    """Multi-head self-attention with the published scale sqrt(d_head + 1e-5)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads + 1e-5) ** -0.5
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self,
        x: Tensor,  # [U, T, D]
        mask: Tensor,  # [U, T]
        num_outputs: int,
    ) -> Tensor:  # [U, num_outputs, D]
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # once, not for each of the maps
        query, key, value = self.query(x[:, :num_outputs]), self.key(x), self.value(x)
        if self.training and _has_kernel(x):
            attended = native_few_token_attention(
                query, key, value, mask, self.num_heads, self.scale
            )
            return self.output(attended)
        query, key, value = (part.unflatten(-1, heads) for part in (query, key, value))
        if is_on_host(x) and x.shape[1] <= FEW_TOKENS:
            attended = _attention_of_few(query, key, value, mask, self.scale)
        else:
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=mask[:, None, None, :],
                scale=self.scale,
            ).transpose(1, 2)
        return self.output(attended.flatten(-2))


def _has_kernel(x: Tensor) -> bool:  # [U, T, D]
    """Return whether kernels attend: in training alone, so that packages need no compiler."""
    return x.shape[1] <= FEW_TOKENS and has_native(x)


def _attention_of_few(
    query: Tensor,  # [U, Q, H, D / H]
    key: Tensor,  # [U, T, H, D / H]
    value: Tensor,  # [U, T, H, D / H]
    mask: Tensor,  # [U, T]
    scale: float,
) -> Tensor:  # [U, Q, H, D / H]
    scores = (query.unsqueeze(2) * key.unsqueeze(1)).sum(-1) * scale  # [U, Q, T, H]
    weights = scores.masked_fill(~mask[:, None, :, None], -torch.inf).softmax(dim=2)
    return (weights.unsqueeze(-1) * value.unsqueeze(1)).sum(dim=2)


class PublishedLayer(nn.Module):
    """Joint self-attention, output dropout, then post-LayerNorm of the residual sum; no FFN."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = JointSelfAttention(dim, num_heads)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(
        self, x: Tensor, mask: Tensor, num_outputs: int
    ) -> Tensor:  # [U, T, D], [U, T] -> [U, num_outputs, D]
        attended = self.attention(x, mask, num_outputs)
        return self.norm(x[:, :num_outputs] + self.dropout(attended))


class ModernLayer(nn.Module):
    """Pre-norm joint self-attention and a GELU feed-forward of four times the width."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = JointSelfAttention(dim, num_heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor, num_outputs: int
    ) -> Tensor:  # [U, T, D], [U, T] -> [U, num_outputs, D]
        attended = self.attention(self.attention_norm(x), mask, num_outputs)
        x = x[:, :num_outputs] + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def weights(self) -> list[Tensor]:
        attention, up, down = self.attention, self.feed_forward[0], self.feed_forward[2]
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        parts: list[nn.Linear | nn.LayerNorm] = [self.attention_norm, attention.query]
        parts += [attention.key, attention.value, attention.output]
        parts += [self.feed_forward_norm, up, down]
        return [weight for part in parts for weight in (part.weight, part.bias)]
