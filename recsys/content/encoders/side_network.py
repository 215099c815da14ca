"""Side tuning: a small trained network over the pooled hidden states of all layers of an encoder.

Ladder side tuning (arXiv 2206.06522), as IISAN (arXiv 2404.02059) has it for recommenders, within
one modality. The encoder stays frozen and its states are cached, so that a step costs about what it
does with frozen features.
Shapes: U items, S states (of the embeddings and of each layer), D width, K width of a bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.content.encoders.base import Pooling, pool
from recsys.data.items.kind import ContentInput


def pooled_states(output: Any, mask: Tensor, pooling: Pooling) -> ContentInput:
    """Pool the states of all layers of a transformers model's output; values [U, S, D]."""
    states = getattr(output, "hidden_states", None)
    if not states or {state.shape for state in states} != {output.last_hidden_state.shape}:
        raise ValueError("side tuning needs the hidden states of all layers, of one width")
    # The last one once more: some models normalise it behind their layers.
    pooled = [pool(state, mask, pooling) for state in (*states[:-1], output.last_hidden_state)]
    return ContentInput(
        torch.cat([state.values for state in pooled], dim=1),
        torch.cat([state.mask for state in pooled], dim=1),
    )


class SideNetwork(nn.Module):
    """k_0 = gelu(V_0 e_0), k_s = gelu(V_s e_s + A_s k_{s-1}); returns e_S + U k_S.

    e are the states, of which e_S is the output of the frozen encoder. U starts at zero, as the
    adapters of LoRA do, so that training begins with the frozen encoder.
    """

    def __init__(self, num_states: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, bottleneck) for _ in range(num_states))
        self.across = nn.ModuleList(
            nn.Linear(bottleneck, bottleneck, bias=False) for _ in range(num_states - 1)
        )
        self.up = nn.Linear(bottleneck, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, content: ContentInput) -> ContentInput:  # [U, S, D] -> [U, 1, D]
        states = content.values.float()
        # A batch in which no item has content is padded to one token alone.
        states = F.pad(states, (0, 0, 0, len(self.down) - states.shape[1]))
        ladder = F.gelu(self.down[0](states[:, 0]))  # [U, K]
        for index, across in enumerate(self.across, start=1):
            ladder = F.gelu(self.down[index](states[:, index]) + across(ladder))
        output = states[:, -1] + self.up(ladder)
        return ContentInput(output.unsqueeze(1), content.mask[:, :1])
