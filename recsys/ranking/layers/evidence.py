"""Logits from what a history says of a target, without ID vectors, which remember training rows.

Shapes: B batch, E numbers of evidence, S similarities, K = NUM_VOTES, P parallel lists,
W = len(LATEST), C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.content.dropout import Dropout

EVIDENCE = ("regression", "variance", "item_mean", "item_count", "user_mean", "history_length")
MEANS = [EVIDENCE.index(name) for name in ("regression", "item_mean", "user_mean")]
LATEST = (5, 20, 200)  # items of the history whose numbers have a mean of their own
NUM_VOTES = 5  # numbers of one similarity

# What brings each number to about mean 0 and deviation 1 on logs of ratings and of plays: Adam
# takes steps of one size for all weights.
EVIDENCE_CENTER, EVIDENCE_SCALE = (0.0, 1.0, 0.0, 3.0, 0.0, 4.0), (3.0, 3.0, 8.0, 0.8, 2.5, 0.8)
VOTE_CENTER, VOTE_SCALE = (0.0, 0.0, 0.0, 1.5, 0.0), (4.0, 3.0, 5.0, 1.2, 2.0)
LIST_SCALE = 2.0
LARGEST = 8.0  # larger numbers are clamped
UNITS = (128, 64)
DROPOUT = 0.1


class EvidenceNetwork(nn.Module):
    """A linear map of the evidence, and an MLP on evidence, votes and means of lists beside it.

    The linear map begins with twice the sum of the evidence's three means, the MLP with 0. Each has
    a loss of its own: with one loss the MLP takes over, and the evidence learns less.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, num_similarities: int, num_parallel: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(len(EVIDENCE), num_labels)
        center = [*EVIDENCE_CENTER, *(VOTE_CENTER * num_similarities)]
        scale = [*EVIDENCE_SCALE, *(VOTE_SCALE * num_similarities)]
        num_means = num_parallel * len(LATEST)
        scale += [LIST_SCALE] * num_means
        self.register_buffer("center", torch.tensor(center + [0.0] * num_means), persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        width = len(scale)
        layers: list[nn.Module] = []
        for units in UNITS:
            layers += [nn.Linear(width, units), nn.ReLU(), Dropout(DROPOUT)]
            width = units
        last = nn.Linear(width, num_labels)
        self.layers = nn.Sequential(*layers, last)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.weight[:, MEANS] = 2.0
            for parameter in (self.linear.bias, last.weight, last.bias):
                parameter.zero_()

    def forward(
        self,
        evidence: Tensor,  # [B, E]
        votes: Tensor,  # [B, S, K]
        list_means: Tensor,  # [B, W * P], of numbers with mean 0 and deviation 1
    ) -> tuple[Tensor, Tensor]:  # [B, C], [B, C]
        """Return the linear map, and its sum with the MLP, with the gradient of the MLP alone."""
        numbers = torch.cat([evidence.detach(), votes.flatten(1), list_means], dim=1)
        inputs = ((numbers - self.center) * self.scale).clamp(-LARGEST, LARGEST)
        linear = self.linear(evidence)
        return linear, linear.detach() + self.layers(inputs)
