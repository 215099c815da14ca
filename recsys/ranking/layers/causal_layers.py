"""Encoders with causal self-attention over the history, whose last token is the target.

HSTU (arXiv 2402.17152) has no softmax, but gates, and biases by position and time. Weights are
SiLU(Q K' + bias) / L with L = `ranking.recent_items`, a constant, so that a row does not depend on
the others of its batch. The causal transformer is SASRec (arXiv 1808.09781) with embeddings of
position and age as in BST (arXiv 1905.06874), and pre-norm layers.
Shapes: B batch, T tokens of all histories, S sequences, L longest sequence, D width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.content.dropout import Dropout
from recsys.ranking.layers.sequence_encoder import (
    NUM_AGES,
    Events,
    KVPair,
    SequenceEncoder,
    doubling_buckets,
    times_between,
)
from recsys.ranking.settings import EncoderSettings

EPSILON = 1e-12  # of the norm of sums, which are small where a history is short


class HstuLayer(nn.Module):
    """A layer of HSTU, with biases by relative position and, if `has_ages`, by time."""

    compiled_methods = ("_tokens", "_attend_events", "_gated", "_queries")  # on GPUs

    def __init__(self, settings: EncoderSettings, has_ages: bool, is_relative: bool = True) -> None:
        super().__init__()
        dim, self.heads = settings.sequence_dim, settings.sequence_heads
        self.longest = settings.recent_items
        self.norm, self.sum_norm = nn.LayerNorm(dim), nn.LayerNorm(dim, eps=EPSILON)
        self.kvqu = nn.Linear(dim, 4 * dim)
        self.output, self.dropout = nn.Linear(dim, dim), Dropout(settings.sequence_dropout)
        self.of_places = _position_biases(settings)
        self.of_times: nn.Parameter | None = None
        if has_ages:
            self.of_times = nn.Parameter(0.02 * torch.randn(self.heads, NUM_AGES))

    def read(self, states: Tensor) -> KVPair:  # [T, D]
        normed = self.norm(states)
        maps = list(zip(self.kvqu.weight.chunk(4), self.kvqu.bias.chunk(4)))
        keys, values = (F.silu(F.linear(normed, *layer)).float() for layer in maps[:2])
        return keys, values

    def history(self, states: Tensor, events: Events) -> tuple[Tensor, KVPair]:  # [T, D] -> [T, D]
        tokens, gates, keys, values = self._tokens(states, events.ages)
        sums = events.sequences.attend(tokens, self._attend_events, recomputes=True)
        return self._gated(states, sums, gates), (keys, values)

    def _tokens(self, states: Tensor, ages: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys, values, queries, ages [T, 3 * D or 3 * D + 1]; gates; keys; values."""
        kvqu, dim = F.silu(self.kvqu(self.norm(states))), states.shape[1]
        tokens = kvqu[:, : 3 * dim].float()
        if self.of_times is not None:
            assert ages is not None
            tokens = torch.cat([tokens, ages], dim=1)
        keys, values = (tensor.contiguous() for tensor in tokens[:, : 2 * dim].chunk(2, dim=1))
        return tokens, kvqu[:, 3 * dim :], keys, values

    def _attend_events(self, padded: Tensor) -> Tensor:  # [S, L, 3 * D or 3 * D + 1] -> [S, L, D]
        """Attend to earlier events of the same sequence; a last column has their ages."""
        width, longest = 3 * self.output.in_features, padded.shape[1]
        vectors = padded[:, :, :width].unflatten(2, (3, self.heads, -1))
        keys, values, queries = vectors.permute(2, 0, 3, 1, 4)
        biases = _biases_between(self.of_places, longest).unsqueeze(0)
        if self.of_times is not None:
            buckets = times_between(padded[:, :, width])
            biases = biases + self.of_times[:, buckets].transpose(0, 1)
        weights = F.silu(queries @ keys.transpose(2, 3) + biases).tril()
        return (weights @ values).transpose(1, 2).flatten(2)

    def target(self, target: Tensor, read: KVPair, events: Events) -> Tensor:  # [B, D] -> [B, D]
        query, event_bias, self_value, gates = self._queries(target, events.positions, events.ages)
        (keys, values), sequences = read, events.sequences
        dots, bias = sequences.dots(query, keys, self.heads), sequences.at_positions(event_bias)
        sums = sequences.sums(F.silu(dots + bias), values)
        return self._gated(target, sums + self_value, gates)

    def _queries(
        self, target: Tensor, positions: Tensor, ages: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map [B, D] to queries, biases of events [H, T], the target's term and gates [B, D]."""
        kvqu = F.silu(self.kvqu(self.norm(target)))
        key, value, query, gates = kvqu.float().chunk(4, dim=1)
        event_bias, self_bias = self.of_places[:, positions + 1], self.of_places[:, 0]
        if self.of_times is not None:
            assert ages is not None
            event_bias = event_bias + self.of_times[:, doubling_buckets(ages.squeeze(1))]
            self_bias = self_bias + self.of_times[:, 0]
        to_self = (query * key).unflatten(1, (self.heads, -1)).sum(dim=2) + self_bias  # [B, H]
        self_value = F.silu(to_self).unsqueeze(2) * value.unflatten(1, (self.heads, -1))
        return query, event_bias, self_value.flatten(1), gates

    def _gated(self, states: Tensor, sums: Tensor, gates: Tensor) -> Tensor:
        return states + self.dropout(self.output(self.sum_norm(sums / self.longest) * gates))


def _position_biases(settings: EncoderSettings) -> nn.Parameter:
    """Return biases [H, positions] by distance: of a target, 0 to itself, 1 to the latest event."""
    return nn.Parameter(0.02 * torch.randn(settings.sequence_heads, settings.recent_items + 2))


def _biases_between(biases: Tensor, longest: int) -> Tensor:  # [H, positions] -> [H, L, L]
    """Return the bias from each event (second axis) to each earlier one (last axis), and itself."""
    positions = torch.arange(longest, device=biases.device)
    return biases[:, (positions.unsqueeze(1) - positions).clamp(min=0)]


class HstuEncoder(SequenceEncoder):
    """Layers of HSTU."""

    Layer = HstuLayer


class TransformerLayer(nn.Module):
    """A layer of attention and feed-forward; its tokens include embeddings of ages.

    Tokens also include embeddings of positions, or scores have biases by distance (`is_relative`).
    """

    compiled_methods = ("_tokens", "_fed_forward", "_queries", "_attended")  # on GPUs

    def __init__(
        self, settings: EncoderSettings, has_ages: bool, is_relative: bool = False
    ) -> None:
        super().__init__()
        dim, self.heads = settings.sequence_dim, settings.sequence_heads
        self.norm, self.hidden_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.kvq = nn.Linear(dim, 3 * dim, bias=False)
        self.output, self.dropout = nn.Linear(dim, dim), Dropout(settings.sequence_dropout)
        # Four times as wide, as in BST.
        self.hidden = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.of_places = _position_biases(settings) if is_relative else None

    def read(self, states: Tensor) -> KVPair:  # [T, D]
        normed = self.norm(states)
        keys, values = (F.linear(normed, weight).float() for weight in self.kvq.weight.chunk(3)[:2])
        return keys, values

    def history(self, states: Tensor, events: Events) -> tuple[Tensor, KVPair]:  # [T, D] -> [T, D]
        kvq, keys, values = self._tokens(states)
        attended = events.sequences.attend(kvq, self._attend_events, recomputes=False)
        return self._fed_forward(states, attended), (keys, values)

    def _tokens(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D]
        """Return keys, values and queries [T, 3 * D], and the first two of them."""
        kvq = self.kvq(self.norm(states)).float()
        keys, values, _ = (tensor.contiguous() for tensor in kvq.chunk(3, dim=1))
        return kvq, keys, values

    def _attend_events(self, padded: Tensor) -> Tensor:  # [S, L, 3 * D] -> [S, L, D]
        keys, values, queries = padded.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        relative = self.of_places
        biases = None if relative is None else _biases_between(relative, padded.shape[1])
        return _causal_attention(queries, keys, values, biases).transpose(1, 2).flatten(2)

    def target(self, target: Tensor, read: KVPair, events: Events) -> Tensor:  # [B, D] -> [B, D]
        query, self_value, to_self = self._queries(target)
        (keys, values), sequences = read, events.sequences
        history = sequences.history
        scores = sequences.dots(query, keys, self.heads)  # [H, T or B * T]
        if self.of_places is not None:
            scores = scores + sequences.at_positions(self.of_places[:, events.positions + 1])
            to_self = to_self + self.of_places[:, 0]
        with torch.no_grad():  # any number may be subtracted from all scores of a row
            highest = torch.maximum(to_self, history.maximum(scores.T.contiguous(), -torch.inf))
        weights = torch.exp(scores - history.spread(highest).T)
        self_weight = torch.exp(to_self - highest)
        total, summed = history.sum(weights.T.contiguous()), sequences.sums(weights, values)
        return self._fed_forward(target, self._attended(total, summed, self_weight, self_value))

    def _queries(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, D] to queries and the target's values [B, D], and scores of its keys [B, H]."""
        self_key, self_value, query = self.kvq(self.norm(target)).float().chunk(3, dim=1)
        query = query * (query.shape[1] // self.heads) ** -0.5
        return query, self_value, (query * self_key).unflatten(1, (self.heads, -1)).sum(dim=2)

    def _attended(
        self, total: Tensor, summed: Tensor, self_weight: Tensor, self_value: Tensor
    ) -> Tensor:
        """Add the target to the events' sums of weights [B, H] and values [B, D]: means [B, D]."""
        total = (total + self_weight).unsqueeze(2)  # [B, H, 1]
        summed = summed.unflatten(1, (self.heads, -1))
        summed = summed + self_weight.unsqueeze(2) * self_value.unflatten(1, (self.heads, -1))
        return (summed / total).flatten(1)

    def _fed_forward(self, states: Tensor, attended: Tensor) -> Tensor:
        states = states + self.dropout(self.output(attended))
        return states + self.dropout(self.hidden(self.hidden_norm(states)))


def _causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, biases: Tensor | None
) -> Tensor:  # thrice [S, H, L, D], [H, L, L] -> [S, H, L, D]
    length, is_exporting = queries.shape[2], torch.compiler.is_exporting()
    if biases is None and not is_exporting:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    later = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    if biases is not None and not is_exporting:
        biases = biases.masked_fill(later, -torch.inf)
        return F.scaled_dot_product_attention(queries, keys, values, biases)
    # An exported graph of PyTorch's attention kernel divides by zero if a history is empty.
    scores = queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
    scores = scores if biases is None else scores + biases
    return scores.masked_fill(later, -torch.inf).softmax(dim=3) @ values


class TransformerEncoder(SequenceEncoder):
    """Layers of the causal transformer, with embeddings of position and age."""

    Layer = TransformerLayer
    embeds_positions = True
