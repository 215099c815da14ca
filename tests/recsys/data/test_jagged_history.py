"""Arithmetic on histories as an index into unique items, against plain indexing and loops."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from recsys.data.jagged_history import JaggedHistory
from tests.host_waits import gpu_branches

DIM = 3
INDEX = torch.tensor([4, 0, 4, 4, 2, 0])  # items 1 and 3 are in no history, 4 three times
LENGTHS = torch.tensor([2, 0, 3, 1])
ROWS = torch.tensor([0, 0, 2, 2, 2, 3])
HISTORY = JaggedHistory.of(INDEX, LENGTHS, num_items=5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sums_by_row(values: Tensor) -> Tensor:
    return torch.stack([rows.sum(dim=0) for rows in values.split(LENGTHS.tolist())])


def maxima_by_row(values: Tensor) -> Tensor:
    nothing = torch.full((1, values.shape[1]), -9.0)
    rows = values.split(LENGTHS.tolist())
    return torch.stack([torch.cat([nothing, row]).amax(dim=0) for row in rows])


def maximum(values: Tensor) -> Tensor:
    return HISTORY.maximum(values, if_empty=-9.0)


def softmax_by_row(scores: Tensor) -> Tensor:
    return torch.cat([row.softmax(dim=0) for row in scores.split(LENGTHS.tolist())])


Operation = Callable[..., Tensor]
CASES: dict[str, tuple[Operation, Operation, list[Tensor]]] = {
    "gather": (HISTORY.gather, lambda items: items[INDEX], [random(5, DIM)]),
    "spread": (HISTORY.spread, lambda rows: rows[ROWS], [random(4, DIM)]),
    "sum": (HISTORY.sum, sums_by_row, [random(6, DIM)]),
    "dot": (
        HISTORY.dot,
        lambda queries, items: (queries[ROWS] * items[INDEX]).sum(1),
        [random(4, DIM), random(5, DIM, seed=1)],
    ),
    "weighted sum": (
        HISTORY.weighted_sum,
        lambda weights, items: sums_by_row(weights[:, None] * items[INDEX]),
        [random(6), random(5, DIM, seed=1)],
    ),
    "softmax": (HISTORY.softmax, softmax_by_row, [random(6)]),
    "softmax of columns": (HISTORY.softmax, softmax_by_row, [random(6, 2)]),
    "maximum": (maximum, maxima_by_row, [random(6, DIM)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_plain_indexing(name: str) -> None:
    operation, reference, inputs = CASES[name]
    output, expected = operation(*inputs), reference(*inputs)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)
    factor = random(*expected.shape, seed=2).detach()
    gradients = torch.autograd.grad((output * factor).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * factor).sum(), inputs)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"maximum"}))
def test_a_batch_without_history_has_empty_results_and_zero_gradients(name: str) -> None:
    nothing = JaggedHistory.of(INDEX[:0], torch.zeros(4, dtype=torch.long), num_items=5)
    operation, _, inputs = CASES[name]
    empty = [tensor[:0] if len(tensor) == len(INDEX) else tensor for tensor in inputs]
    output = getattr(nothing, operation.__name__)(*empty)
    assert output.numel() == 0 or not output.any()
    for gradient in torch.autograd.grad(output.sum(), empty, allow_unused=True):
        assert gradient is None or not gradient.any()


def test_the_maximum_of_nothing_is_what_is_asked_for_and_equal_maxima_share_the_gradient() -> None:
    values = torch.tensor([[1.0], [1.0], [3.0], [2.0], [3.0], [0.0]], requires_grad=True)
    maxima = HISTORY.maximum(values, if_empty=-2.0)
    assert maxima.squeeze(1).tolist() == [1.0, -2.0, 3.0, 0.0]
    maxima.sum().backward()
    assert values.grad.squeeze(1).tolist() == [0.5, 0.5, 0.5, 0.0, 0.5, 1.0]
    nothing = JaggedHistory.of(INDEX[:0], torch.zeros(4, dtype=torch.long), num_items=5)
    assert (nothing.maximum(values[:0], -2.0) == -2.0).all()


def test_padded_puts_each_row_s_numbers_first() -> None:
    padded = HISTORY.padded(torch.arange(6.0), fill=-2.0)
    assert padded.tolist() == [[0, 1, -2], [-2, -2, -2], [2, 3, 4], [5, -2, -2]]


def test_an_unindexed_history_takes_each_place_as_an_item_of_its_own() -> None:
    items = random(5, DIM).detach()
    unindexed = HISTORY.unindexed()
    assert unindexed.num_items == len(INDEX)
    queries = random(4, DIM, seed=1).detach()
    assert torch.equal(unindexed.dot(queries, items[INDEX]), HISTORY.dot(queries, items))


def test_one_compiled_graph_serves_histories_of_any_length() -> None:
    """Graphs would else be made anew whenever the longest history of a batch has another length."""

    def scored(items: Tensor, queries: Tensor, history: JaggedHistory) -> Tensor:
        weights = history.softmax(history.dot(queries, items))  # [N]
        return history.weighted_sum(weights, items.tanh())

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(scored, backend="aot_eager", dynamic=True)
    for lengths in ([3, 0, 7], [5, 2, 2, 1], [9, 8, 4, 6, 0]):
        index = torch.randint(11, (sum(lengths),))
        history = JaggedHistory.of(index, torch.tensor(lengths), 11, max(lengths))
        values = [torch.randn(11, 6), torch.randn(len(lengths), 6)]
        results = []
        for function in (scored, compiled):
            inputs = [value.clone().requires_grad_() for value in values]
            with gpu_branches():  # the others compile parts that have no histories
                output = function(*inputs, history)
                output.sum().backward()
            results.append([output, *(value.grad for value in inputs)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
