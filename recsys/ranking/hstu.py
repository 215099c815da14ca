"""HSTU: attention without softmax, gated, with biases of place and time.

As in Zhai et al. 2024 (arXiv 2402.17152, the hierarchical sequential transduction unit of
generative-recommenders): one linear map with SiLU gives U, V, Q and K; weights are
SiLU(Q K' + bias) / L with a bias per distance in places and per bucket of the time between events;
their sum of V is normalised, multiplied by U, mapped and added. Without a softmax, a state keeps
how many items match a target, and not their share alone. L is `ranking.recent_items`, a constant,
so that a row does not depend on the others of its batch.

Shapes: B batch, T tokens of all histories, S sequences, L longest sequence, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ContentSettings
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.aged_attention import NUM_AGES
from recsys.ranking.layers.sequence_features import Events, SequenceLayer, SequenceModel
from recsys.ranking.layers.sequence_times import doubling_buckets, times_between
from recsys.ranking.settings import HstuSettings

EPSILON = 1e-12  # of the norm of sums, which are small where a history is short


class HstuLayer(SequenceLayer):
    """A layer of HSTU.

    Args:
        settings: widths, heads and `recent_items`.
        has_ages: whether the ages of events are known.
    """

    def __init__(self, settings: HstuSettings, has_ages: bool) -> None:
        """Create maps, norms and the tables of biases."""
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

    def read(self, states: Tensor) -> Tensor:  # [T, D] -> [T, 2 * D]
        """Return K and V of events."""
        width = 2 * states.shape[1]
        return F.silu(F.linear(self.norm(states), self.kvqu.weight[:width], self.kvqu.bias[:width]))

    def history(
        self,
        states: Tensor,  # [T, D]
        events: Events,
    ) -> tuple[Tensor, Tensor]:  # [T, D], [T, 2 * D]
        """Return new states of the events, and K and V of the old ones."""
        kvqu, dim = F.silu(self.kvqu(self.norm(states))), states.shape[1]
        tokens = kvqu[:, : 3 * dim].float()
        if self.of_times is not None:
            assert events.ages is not None
            tokens = torch.cat([tokens, events.ages], dim=1)
        sums = events.sequences.attend(tokens, self._among_events, recomputes=True)
        return self._gated(states, sums, kvqu[:, 3 * dim :]), kvqu[:, : 2 * dim]

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

    def target(
        self,
        target: Tensor,  # [B, D]
        read: Tensor,  # [T, 2 * D]
        events: Events,
    ) -> Tensor:  # [B, D]
        """Return new states of the targets."""
        keys, values, queries, gates = F.silu(self.kvqu(self.norm(target))).chunk(4, dim=1)
        of_events = self.of_places[:, events.places + 1]  # [H, T]
        of_itself = self.of_places[:, 0]
        if self.of_times is not None:
            assert events.ages is not None
            of_events = of_events + self.of_times[:, doubling_buckets(events.ages.squeeze(1))]
            of_itself = of_itself + self.of_times[:, 0]
        history, sums = events.sequences.history, []
        for head, (of_keys, of_values) in enumerate(zip(*_heads(read, self.heads))):
            biases = history.gather(of_events[head].unsqueeze(1)).squeeze(1)
            query, key, value = (_head(part, self.heads, head) for part in (queries, keys, values))
            weights = F.silu(history.dot(query, of_keys) + biases)
            of_target = F.silu((query * key).sum(dim=1, keepdim=True) + of_itself[head])
            sums.append(history.weighted_sum(weights, of_values) + of_target * value)
        return self._gated(target, torch.cat(sums, dim=1), gates)

    def _gated(self, states: Tensor, sums: Tensor, gates: Tensor) -> Tensor:
        """Add the normalised sums times their gates, mapped, to the states."""
        return states + self.output(self.sum_norm(sums / self.longest) * gates)


def _heads(read: Tensor, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Split K and V [T, 2 * D] into those of each head, [T, D / H]."""
    parts = [part.contiguous() for part in read.float().chunk(2 * heads, dim=1)]
    return parts[:heads], parts[heads:]


def _head(vectors: Tensor, heads: int, head: int) -> Tensor:
    """Return the part of a head, [B, D / H]."""
    return vectors.float().chunk(heads, dim=1)[head].contiguous()


class Hstu(SequenceModel):
    """ID vectors, content vectors and dense features -> one logit per label."""

    Settings = HstuSettings

    def __init__(
        self,
        settings: HstuSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        """Build tokens, layers, features and the output head."""
        super().__init__(settings, dimensions, content, HstuLayer)
