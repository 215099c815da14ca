"""Logits from what a history says of a target, without ID vectors, which remember training rows.

Shapes: B batch, E numbers of evidence, S similarities, K = NUM_VOTES, P parallel lists,
W = len(LATEST), C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.ranking.layers.heads import hidden_layers
from recsys.ranking.layers.row_features import Standardization
from recsys.ranking.vectors import InputDimensions

EVIDENCE = ("regression", "variance", "item_mean", "item_count", "user_mean", "history_length")
MEANS = [EVIDENCE.index(name) for name in ("regression", "item_mean", "user_mean")]
# Items of the history whose numbers have a mean of their own. That of the latest 5 would follow how
# a user's level drifts, and rank worse within users.
LATEST = (20, 200)
NUM_VOTES = 5  # numbers of one similarity

UNITS = [128, 64]
DROPOUT = 0.1


class EvidenceNetwork(nn.Module):
    """A linear map of the evidence, and an MLP on evidence, votes and means of lists beside it.

    The linear map begins with twice the sum of the evidence's three means, the MLP with 0. Each has
    a loss of its own: with one loss the MLP takes over, and the evidence learns less.
    """

    def __init__(self, num_similarities: int, dimensions: InputDimensions) -> None:
        super().__init__()
        width = len(EVIDENCE) + num_similarities * NUM_VOTES
        width += len(dimensions.parallel_names) * len(LATEST)
        self.standardization = Standardization(width, dimensions.process_group)
        self.linear = nn.Linear(len(EVIDENCE), dimensions.num_labels)
        layers, width = hidden_layers(width, UNITS, DROPOUT)
        last = nn.Linear(width, dimensions.num_labels)
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
        list_means: Tensor,  # [B, W * P]
        row_weights: Tensor,  # [B], 0 for a padding row
    ) -> tuple[Tensor, Tensor]:  # [B, C], [B, C]
        """Return the linear map, and its sum with the MLP, with the gradient of the MLP alone.

        A collective in training: all ranks share the scales of the MLP's inputs.
        """
        numbers = torch.cat([evidence.detach(), votes.flatten(1), list_means], dim=1)
        linear = self.linear(evidence)
        return linear, linear.detach() + self.layers(self.standardization(numbers, row_weights))
