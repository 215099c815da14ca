"""The decoder of generative retrieval: the user's state and the codes so far give the next code.

Shapes: B batch, L levels, T = L + 1 codes of an item with the last one, C codes, D width, H heads,
N beams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.ranking.layers.causal_layers import TransformerLayer
from recsys.ranking.settings import EncoderSettings

KeysAndValues = tuple[Tensor, Tensor]  # [N, H, tokens, D / H] each


class DecoderLayer(TransformerLayer):
    """A causal layer over the few tokens of each row, which may go on from earlier ones."""

    def forward(
        self, states: Tensor, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:  # [N, tokens, D]; one token if there is a past
        kvq = self.kvq(self.norm(states)).unflatten(2, (3, self.heads, -1))
        keys, values, queries = kvq.permute(2, 0, 3, 1, 4)
        if past is not None:
            keys = torch.cat([past[0], keys], dim=2)
            values = torch.cat([past[1], values], dim=2)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=past is None)
        return self._fed_forward(states, attended.transpose(1, 2).flatten(2)), (keys, values)


@dataclass
class Beam:
    """Tokens to decode next [N, 1, D], and keys and values of those before, by layer."""

    tokens: Tensor
    past: list[KeysAndValues]


class CodeDecoder(nn.Module):
    """The user's state and the codes so far -> log-probabilities of the next code."""

    def __init__(self, dim: int, heads: int, layers: int, levels: int, codes: int) -> None:
        super().__init__()
        settings = EncoderSettings(sequence_dim=dim, sequence_heads=heads)
        self.num_levels = levels + 1
        self.codes = nn.Parameter(torch.randn(levels + 1, codes, dim) * dim**-0.5)
        self.places = nn.Parameter(torch.zeros(levels + 1, dim))
        self.layers = nn.ModuleList(DecoderLayer(settings, False) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, states: Tensor, table: Tensor) -> Tensor:  # [B, D], int64 [B, T + 1] -> [B]
        """Return the log-probability of all codes of an item; the last column is its group's size.

        All codes are read in one pass: the reference of `step`.
        """
        codes, sizes = table[:, :-1], table[:, -1]
        read = [self.codes[level][codes[:, level]] for level in range(self.num_levels - 1)]
        tokens = torch.stack([states, *read], dim=1) + self.places
        for layer in self.layers:
            tokens, _ = layer(tokens)
        log_probs = [
            self._log_probs(tokens[:, level], level, sizes) for level in range(self.num_levels)
        ]
        item_log_probs = torch.stack(log_probs, dim=1).gather(2, codes.unsqueeze(2))  # [B, T, 1]
        return item_log_probs.sum(dim=(1, 2))

    def start(self, states: Tensor) -> Beam:  # [N, D]
        return Beam((states + self.places[0]).unsqueeze(1), [])

    def step(
        self, beam: Beam, level: int, sizes: Tensor | None = None
    ) -> tuple[Tensor, list[KeysAndValues]]:  # [N, C]
        """Return the log-probabilities of the next code, and what later steps read of this one.

        At the last level `sizes` [N] are the numbers of items that share the codes so far.
        """
        tokens, cache = beam.tokens, []
        for place, layer in enumerate(self.layers):
            tokens, keys_and_values = layer(tokens, beam.past[place] if beam.past else None)
            cache.append(keys_and_values)
        return self._log_probs(tokens[:, 0], level, sizes), cache

    def follow(
        self, cache: list[KeysAndValues], parents: Tensor, level: int, codes: Tensor
    ) -> Beam:  # int64 [N], int64 [N]
        """Return the beam of new codes, each behind the tokens of its parent."""
        tokens = self.codes[level][codes] + self.places[level + 1]
        past = [(keys[parents], values[parents]) for keys, values in cache]
        return Beam(tokens.unsqueeze(1), past)

    def _log_probs(self, tokens: Tensor, level: int, sizes: Tensor | None) -> Tensor:  # [N, D]
        logits = (self.norm(tokens) @ self.codes[level].T).float()
        if level == self.num_levels - 1:
            assert sizes is not None
            is_code = (
                torch.arange(logits.shape[1], device=logits.device) < sizes.clamp(min=1)[:, None]
            )
            logits = logits.masked_fill(~is_code, -torch.inf)
        return logits.log_softmax(dim=1)
