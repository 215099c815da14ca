"""HSTU: attention without softmax, gated, with biases of place and time (arXiv 2402.17152).

Weights are SiLU(Q K' + bias) / L with L = `ranking.recent_items`, a constant, so that a row does
not depend on the others of its batch.
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
    times_between,
)
from recsys.ranking.settings import HstuSettings

EPSILON = 1e-12  # of the norm of sums, which are small where a history is short


class HstuLayer(nn.Module):
    """A layer of HSTU; its maps read the ages of events if `has_ages`."""

    def __init__(self, settings: HstuSettings, has_ages: bool) -> None:
        super().__init__()
        dim, self.heads = settings.sequence_dim, settings.sequence_heads
        self.longest = settings.recent_items
        self.norm, self.sum_norm = nn.LayerNorm(dim), nn.LayerNorm(dim, eps=EPSILON)
        self.kvqu = nn.Linear(dim, 4 * dim)
        self.output = nn.Linear(dim, dim)
        # By the distance in places: of a target, 0 to itself and 1 to the latest event.
        self.of_places = nn.Parameter(0.02 * torch.randn(self.heads, self.longest + 2))
        self.of_times: nn.Parameter | None = None
        if has_ages:
            self.of_times = nn.Parameter(0.02 * torch.randn(self.heads, NUM_AGES))

    def read(self, states: Tensor) -> Read:  # [T, D]
        normed = self.norm(states)
        weights, biases = self.kvqu.weight.chunk(4), self.kvqu.bias.chunk(4)
        keys, values = (
            F.silu(F.linear(normed, weight, bias)).float()
            for weight, bias in zip(weights[:2], biases[:2])
        )
        return keys, values

    def history(self, states: Tensor, events: Events) -> tuple[Tensor, Read]:  # [T, D] -> [T, D]
        kvqu, dim = F.silu(self.kvqu(self.norm(states))), states.shape[1]
        tokens = kvqu[:, : 3 * dim].float()
        if self.of_times is not None:
            assert events.ages is not None
            tokens = torch.cat([tokens, events.ages], dim=1)
        sums = events.sequences.attend(tokens, self._among_events, recomputes=True)
        keys, values = (part.contiguous() for part in tokens[:, : 2 * dim].chunk(2, dim=1))
        return self._gated(states, sums, kvqu[:, 3 * dim :]), (keys, values)

    def _among_events(self, padded: Tensor) -> Tensor:  # [S, L, 3 * D or 3 * D + 1] -> [S, L, D]
        """Attend to earlier events of the same sequence; a last column has their ages."""
        width, longest = 3 * self.output.in_features, padded.shape[1]
        vectors = padded[:, :, :width].unflatten(2, (3, self.heads, -1))
        keys, values, queries = vectors.permute(2, 0, 3, 1, 4)
        places = torch.arange(longest, device=padded.device)
        biases = self.of_places[:, (places.unsqueeze(1) - places).clamp(min=0)].unsqueeze(0)
        if self.of_times is not None:
            buckets = times_between(padded[:, :, width])
            biases = biases + self.of_times[:, buckets].transpose(0, 1)
        weights = F.silu(queries @ keys.transpose(2, 3) + biases).tril()
        return (weights @ values).transpose(1, 2).flatten(2)

    def target(self, target: Tensor, read: Read, events: Events) -> Tensor:  # [B, D] -> [B, D]
        kvqu = F.silu(self.kvqu(self.norm(target)))
        own_key, own_value, query, gates = kvqu.float().chunk(4, dim=1)
        event_bias, self_bias = self.of_places[:, events.places + 1], self.of_places[:, 0]
        if self.of_times is not None:
            assert events.ages is not None
            event_bias = event_bias + self.of_times[:, doubling_buckets(events.ages.squeeze(1))]
            self_bias = self_bias + self.of_times[:, 0]
        keys, values = read
        sequences = events.sequences
        scores = sequences.dots(query, keys, self.heads) + sequences.at_places(event_bias)
        sums = sequences.sums(F.silu(scores), values)
        to_self = (query * own_key).unflatten(1, (self.heads, -1)).sum(dim=2) + self_bias  # [B, H]
        self_value = F.silu(to_self).unsqueeze(2) * own_value.unflatten(1, (self.heads, -1))
        return self._gated(target, sums + self_value.flatten(1), gates)

    def _gated(self, states: Tensor, sums: Tensor, gates: Tensor) -> Tensor:
        return states + self.output(self.sum_norm(sums / self.longest) * gates)


class Hstu(SequenceModel):
    """ID vectors, content vectors and dense features -> one logit per label."""

    Settings = HstuSettings

    def __init__(
        self, settings: HstuSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__(settings, dimensions, content, HstuLayer)
