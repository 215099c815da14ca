"""The network of the evidence: where it begins, what it computes, and whose gradient it passes."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.ranking.layers.evidence import (
    EVIDENCE,
    EVIDENCE_CENTER,
    EVIDENCE_SCALE,
    LARGEST,
    LATEST,
    LIST_SCALE,
    NUM_VOTES,
    VOTE_CENTER,
    VOTE_SCALE,
    EvidenceNetwork,
)

NUM_ROWS, NUM_SIMILARITIES, NUM_LISTS = 4, 2, 3


def network_and_inputs() -> tuple[EvidenceNetwork, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    evidence = torch.randn(NUM_ROWS, len(EVIDENCE), requires_grad=True)
    votes = torch.randn(NUM_ROWS, NUM_SIMILARITIES, NUM_VOTES)
    list_means = 9 * torch.randn(NUM_ROWS, NUM_LISTS * len(LATEST))
    return EvidenceNetwork(NUM_SIMILARITIES, NUM_LISTS, 1).eval(), (evidence, votes, list_means)


def test_logits_begin_as_twice_the_sum_of_the_means() -> None:
    network, inputs = network_and_inputs()
    columns = [EVIDENCE.index(name) for name in ("regression", "item_mean", "user_mean")]
    expected = 2 * inputs[0][:, columns].sum(dim=1, keepdim=True)
    for logits in network(*inputs):
        torch.testing.assert_close(logits, expected)


def test_logits_are_a_linear_map_plus_an_mlp_of_scaled_and_clamped_inputs() -> None:
    network, (evidence, votes, list_means) = network_and_inputs()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    parts = [(evidence - torch.tensor(EVIDENCE_CENTER)) * torch.tensor(EVIDENCE_SCALE)]
    for similarity in range(NUM_SIMILARITIES):
        parts.append((votes[:, similarity] - torch.tensor(VOTE_CENTER)) * torch.tensor(VOTE_SCALE))
    hidden = torch.cat([*parts, list_means * LIST_SCALE], dim=1).clamp(-LARGEST, LARGEST)
    first, second, last = (part for part in network.layers if isinstance(part, torch.nn.Linear))
    for layer in (first, second):
        hidden = (hidden @ layer.weight.T + layer.bias).relu()
    linear = evidence @ network.linear.weight.T + network.linear.bias
    expected = linear + hidden @ last.weight.T + last.bias
    actual = network(evidence, votes, list_means)
    torch.testing.assert_close(actual, (linear, expected))


def test_the_evidence_learns_from_the_linear_map_alone() -> None:
    network, inputs = network_and_inputs()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    linear, logits = network(*inputs)
    (gradient,) = torch.autograd.grad(linear.sum(), inputs[0])
    torch.testing.assert_close(gradient, network.linear.weight.expand(NUM_ROWS, -1))
    logits.sum().backward()
    assert inputs[0].grad is None and network.linear.weight.grad is None
