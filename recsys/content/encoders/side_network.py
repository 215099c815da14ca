"""Side tuning: a small trained network over the pooled hidden states of all layers of an encoder.

IISAN (arXiv 2404.02059), within one modality. The encoder stays frozen and its states are cached,
so that a step costs about what it does with frozen features.
Shapes: U items, S states (of the embeddings and of each layer), D width, K width of a bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.content.encoders.base import Pooling, pool
from recsys.data.items.kind import ContentInput

GATE_START = 2.0  # sigmoid .88: an untrained network returns little but the state of the top layer


def pooled_states(output: Any, mask: Tensor, pooling: Pooling) -> ContentInput:
    """Pool the states of all layers of a transformers model's output; values [U, S, D].

    Raises:
        ValueError: the model gives no states of all layers, or states of several widths.
    """
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
    """h_0 = B_0(e_0), h_s = B_s(g_s e_s + (1 - g_s) h_{s-1}), with B(x) = x + U gelu(V x).

    e are the states, g learned gates. U starts at zero, as the adapters of LoRA do.
    """

    def __init__(self, num_states: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.full((num_states - 1,), GATE_START))
        up = [nn.Linear(bottleneck, width) for _ in range(num_states)]
        for layer in up:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.down = nn.ModuleList(nn.Linear(width, bottleneck) for _ in range(num_states))
        self.up = nn.ModuleList(up)

    def forward(self, content: ContentInput) -> ContentInput:  # [U, S, D] -> [U, 1, D]
        states = content.values.float()
        # A batch in which no item has content is padded to one token alone.
        states = F.pad(states, (0, 0, 0, len(self.down) - states.shape[1]))
        gates, fused = self.gates.sigmoid(), states[:, 0]
        for index, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            if index:
                fused = torch.lerp(fused, states[:, index], gates[index - 1])
            fused = fused + up(F.gelu(down(fused)))
        return ContentInput(fused.unsqueeze(1), content.mask[:, :1])
