"""The network of the evidence: where it begins, what it computes, and whose gradient it passes."""

import torch
from torch import Tensor

from recsys.ranking.layers.evidence import EVIDENCE, LATEST, NUM_VOTES, EvidenceNetwork
from tests.recsys.ranking.ranking_inputs import DIMENSIONS

NUM_ROWS, NUM_SIMILARITIES, NUM_LISTS = 4, 2, len(DIMENSIONS.parallel_names)


def network_and_inputs() -> tuple[EvidenceNetwork, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    evidence = torch.randn(NUM_ROWS, len(EVIDENCE), requires_grad=True)
    votes = torch.randn(NUM_ROWS, NUM_SIMILARITIES, NUM_VOTES)
    list_means = torch.randn(NUM_ROWS, NUM_LISTS * len(LATEST))
    network = EvidenceNetwork(NUM_SIMILARITIES, DIMENSIONS).eval()
    return network, (evidence, votes, list_means, torch.ones(NUM_ROWS))


def test_logits_begin_as_twice_the_sum_of_the_means() -> None:
    network, inputs = network_and_inputs()
    columns = [EVIDENCE.index(name) for name in ("regression", "item_mean", "user_mean")]
    expected = 2 * inputs[0][:, columns].sum(dim=1, keepdim=True)
    for logits in network(*inputs):
        torch.testing.assert_close(logits, expected)


def test_logits_are_a_linear_map_plus_an_mlp_of_standardized_numbers() -> None:
    network, inputs = network_and_inputs()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    numbers = torch.cat([tensor.flatten(1) for tensor in inputs[:3]], dim=1)
    hidden = network.standardization(numbers)
    first, second, last = (unit for unit in network.layers if isinstance(unit, torch.nn.Linear))
    for layer in (first, second):
        hidden = (hidden @ layer.weight.T + layer.bias).relu()
    linear = inputs[0] @ network.linear.weight.T + network.linear.bias
    expected = linear + hidden @ last.weight.T + last.bias
    torch.testing.assert_close(network(*inputs), (linear, expected))


def test_training_standardizes_by_the_rows_that_are_no_padding() -> None:
    network, inputs = network_and_inputs()
    network.train()(*inputs[:3], torch.tensor([1.0, 1.0, 1.0, 0.0]))
    numbers = torch.cat([tensor.flatten(1) for tensor in inputs[:3]], dim=1)
    torch.testing.assert_close(network.standardization.mean, numbers[:3].mean(dim=0).detach())


def test_the_evidence_learns_from_the_linear_map_alone() -> None:
    network, inputs = network_and_inputs()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    linear, logits = network(*inputs)
    (gradient,) = torch.autograd.grad(linear.sum(), inputs[0])
    torch.testing.assert_close(gradient, network.linear.weight.expand(NUM_ROWS, -1))
    logits.sum().backward()
    assert inputs[0].grad is None and network.linear.weight.grad is None
