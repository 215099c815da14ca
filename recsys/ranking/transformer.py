"""A causal transformer over the history (SASRec, arXiv 1808.09781), with the target as last token.

As in BST (arXiv 1905.06874), embeddings of place and age are added. Norms stand before each part.
Shapes: B batch, T tokens of all histories, S sequences, L longest sequence, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ContentSettings
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.sequence_model import (
    NUM_AGES,
    Events,
    Read,
    SequenceModel,
    doubling_buckets,
)
from recsys.ranking.settings import TransformerSettings

WIDENING = 4  # of the feed-forward layer, as in BST


class TransformerLayer(nn.Module):
    """A layer of attention and feed-forward; embeddings of ages are in its tokens."""

    def __init__(self, settings: TransformerSettings, has_ages: bool) -> None:
        super().__init__()
        del has_ages
        dim, self.heads = settings.sequence_dim, settings.sequence_heads
        self.norm, self.hidden_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.kvq = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim)
        self.hidden = nn.Sequential(
            nn.Linear(dim, WIDENING * dim), nn.ReLU(), nn.Linear(WIDENING * dim, dim)
        )

    def read(self, states: Tensor) -> Read:  # [T, D]
        normed = self.norm(states)
        keys, values = (F.linear(normed, weight).float() for weight in self.kvq.weight.chunk(3)[:2])
        return keys, values

    def history(self, states: Tensor, events: Events) -> tuple[Tensor, Read]:  # [T, D] -> [T, D]
        kvq = self.kvq(self.norm(states)).float()
        attended = events.sequences.attend(kvq, self._among_events, recomputes=False)
        keys, values, _ = (part.contiguous() for part in kvq.chunk(3, dim=1))
        return self._fed_forward(states, attended), (keys, values)

    def _among_events(self, padded: Tensor) -> Tensor:  # [S, L, 3 * D] -> [S, L, D]
        keys, values, queries = padded.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return attended.transpose(1, 2).flatten(2)

    def target(self, target: Tensor, read: Read, events: Events) -> Tensor:  # [B, D] -> [B, D]
        own_key, own_value, query = self.kvq(self.norm(target)).float().chunk(3, dim=1)
        query = query * (query.shape[1] // self.heads) ** -0.5
        (keys, values), sequences = read, events.sequences
        history = sequences.history
        scores = sequences.dots(query, keys, self.heads)  # [H, T or B * T]
        to_self = (query * own_key).unflatten(1, (self.heads, -1)).sum(dim=2)  # [B, H]
        with torch.no_grad():  # any number may be subtracted from all scores of a row
            highest = torch.maximum(to_self, history.maximum(scores.T.contiguous(), -torch.inf))
        weights = torch.exp(scores - history.spread(highest).T)
        self_weight = torch.exp(to_self - highest)
        total = (history.sum(weights.T.contiguous()) + self_weight).unsqueeze(2)  # [B, H, 1]
        summed = sequences.sums(weights, values).unflatten(1, (self.heads, -1))
        summed = summed + self_weight.unsqueeze(2) * own_value.unflatten(1, (self.heads, -1))
        return self._fed_forward(target, (summed / total).flatten(1))

    def _fed_forward(self, states: Tensor, attended: Tensor) -> Tensor:
        states = states + self.output(attended)
        return states + self.hidden(self.hidden_norm(states))


class Transformer(SequenceModel):
    """ID vectors, content vectors and dense features -> one logit per label."""

    Settings = TransformerSettings

    def __init__(
        self,
        settings: TransformerSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        super().__init__(settings, dimensions, content, TransformerLayer)
        dim, has_ages = settings.sequence_dim, self.gaps.column is not None
        self.places = nn.Embedding(settings.recent_items + 1, dim)
        self.ages = nn.Embedding(NUM_AGES, dim) if has_ages else None
        for table in (self.places, self.ages):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def positioned(
        self,
        tokens: Tensor,  # [T, D]
        target: Tensor,  # [B, D]
        events: Events,
    ) -> tuple[Tensor, Tensor]:
        tokens = tokens + self.places(events.places)
        if self.ages is not None:
            assert events.ages is not None
            tokens = tokens + self.ages(doubling_buckets(events.ages.squeeze(1)))
        return tokens, target
