"""Native kernels equal the PyTorch reference, to the last bit in every run and for all threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import native_dot_interaction
from recsys.kernels.choice import _Chosen
from recsys.ranking.dlrm import DotInteraction
from recsys.ranking.layers.target_attention import TargetAttention

pytestmark = pytest.mark.usefixtures("native_kernels")

Inputs = tuple[Tensor, Tensor, JaggedHistory, Tensor]
# History lengths, D, units of the two layers, P; and how many distinct items there are.
CASES = {
    "short and empty histories": ([2, 0, 3, 1, 0], 4, [6, 3], 2, 4),
    "long ones": ([20, 70, 0, 5, 130], 16, [64, 16], 1, 40),
    "no lists": ([50, 3, 4, 9], 10, [130, 5], 0, 30),
    "one row": ([7], 8, [8, 40], 1, 3),
    "wide": ([6, 2], 64, [512, 20], 3, 9),
    "one unit": ([3, 3], 5, [1, 1], 0, 2),
    "only empty histories": ([0, 0], 4, [6, 3], 2, 3),
}


def attention_case(
    lengths: list[int],
    dim: int,
    units: list[int],
    num_parallel: int,
    num_items: int,
    device: str = "cpu",
) -> tuple[TargetAttention, Inputs]:
    torch.manual_seed(0)
    places = sum(lengths)
    history = JaggedHistory.of(
        torch.randint(num_items, (places,)).to(device), torch.tensor(lengths).to(device), num_items
    )
    target, items = torch.randn(len(lengths), dim), torch.randn(num_items, dim)
    parallel = torch.rand(places, num_parallel)
    vectors = target.to(device), items.to(device), history, parallel.to(device)
    return TargetAttention(dim, num_parallel, units).to(device), vectors


def output_and_gradients(attention: TargetAttention, inputs: Inputs) -> dict[str, Tensor]:
    target, items = (part.detach().clone().requires_grad_() for part in inputs[:2])
    output = attention(target, items, *inputs[2:])
    factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device)
    variables = {"target": target, "items": items, **dict(attention.named_parameters())}
    gradients = torch.autograd.grad(
        (output * factor).sum(), list(variables.values()), allow_unused=False
    )
    return {"output": output.detach(), **dict(zip(variables, gradients, strict=True))}


def by_reference(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    with monkeypatch.context() as context:
        context.setattr(_Chosen, "kernels", "torch")
        return compute()


@pytest.mark.parametrize("case", ["short and empty histories", "long ones"])
def test_units_that_are_kept_change_nothing(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    attention, inputs = attention_case(*CASES[case])
    kept = output_and_gradients(attention, inputs)
    monkeypatch.setattr("recsys.kernels.target_attention.MAX_KEPT_BYTES", 0)
    again = output_and_gradients(attention, inputs)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_reference(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    attention, inputs = attention_case(*CASES[case])
    native = output_and_gradients(attention, inputs)
    reference = by_reference(monkeypatch, lambda: output_and_gradients(attention, inputs))
    torch.testing.assert_close(native["output"], reference["output"], rtol=1e-6, atol=1e-6)
    for name in reference.keys() - {"output", "score.4.bias"}:
        # The largest gradient is the scale: single ones are sums in which much cancels out.
        scale = float(reference[name].abs().max())
        torch.testing.assert_close(
            native[name], reference[name], rtol=1e-5, atol=1e-6 + 1e-5 * scale
        )
    assert not native["score.4.bias"].any()  # shifts all of a softmax


@pytest.mark.parametrize("name", ["score.0.weight", "score.2.bias", "target", "items"])
def test_what_is_not_a_number_stays_one_as_in_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    attention, inputs = attention_case([2, 0, 20], 4, [6, 3], 1, 4)
    tensors = {"target": inputs[0], "items": inputs[1], **dict(attention.named_parameters())}
    tensors[name].data.view(-1)[-1] = float("nan")
    native = output_and_gradients(attention, inputs)
    reference = by_reference(monkeypatch, lambda: output_and_gradients(attention, inputs))
    assert reference["output"].isnan().any()
    for part in ("output", "target", "items", "score.0.weight"):
        assert torch.equal(native[part].isnan(), reference[part].isnan()), part


def test_a_hidden_unit_more_or_less_is_left_to_the_reference() -> None:
    attention = TargetAttention(4, 0, [6])
    _, (target, items, history, _) = attention_case([2, 1], 4, [6, 3], 0, 4)
    assert attention(target, items, history, torch.zeros(3, 0)).shape == target.shape


def test_attention_is_equal_to_the_last_bit_for_one_thread_and_two() -> None:
    lengths = torch.randint(0, 12, (1200,), generator=torch.Generator().manual_seed(0)).tolist()
    attention, inputs = attention_case(lengths, 4, [8, 4], 1, 50)  # several groups of rows
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(output_and_gradients(attention, inputs))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_a_row_s_interest_does_not_depend_on_the_rows_beside_it() -> None:
    attention, (target, items, history, parallel) = attention_case([3, 40, 2], 6, [9, 5], 1, 30)
    alone = JaggedHistory.of(history.index[3:43], torch.tensor([40]), 30)
    with torch.no_grad():
        together = attention(target, items, history, parallel)
        assert torch.equal(together[1:2], attention(target[1:2], items, alone, parallel[3:43]))


def test_an_index_outside_of_the_items_is_an_error() -> None:
    attention, (target, items, history, parallel) = attention_case([2, 1], 4, [6, 3], 0, 4)
    history.index[1] = 4
    with pytest.raises(RuntimeError, match=r"recsys::target_attention: .*index\[1\] is 4"):
        attention(target, items, history, parallel)


def test_under_autocast_and_of_bfloat16_the_results_have_the_types_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention, (target, items, *rest) = attention_case([5, 2], 8, [16, 4], 1, 6)
    dots, sparse = DotInteraction(2), torch.randn(2, 2, 8)

    def compute() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            parts = {"float": attention(target, items, *rest), "dots": dots(target, sparse)}
            half = target.bfloat16()
            parts["bfloat"] = attention(half, items.bfloat16(), *rest)
            return parts | {"dots of bfloat": dots(half, sparse)}

    native, reference = compute(), by_reference(monkeypatch, compute)
    for name, value in reference.items():
        assert native[name].dtype == value.dtype, name
        torch.testing.assert_close(native[name], value, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("num_fields", "dim"), [(1, 8), (4, 3), (26, 16), (40, 40)])
def test_dot_interaction_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, num_fields: int, dim: int
) -> None:
    def compute() -> dict[str, Tensor]:
        torch.manual_seed(0)
        dense = torch.randn(5, dim).requires_grad_()
        sparse = torch.randn(5, num_fields, dim).requires_grad_()
        output = DotInteraction(num_fields)(dense, sparse)
        gradients = torch.autograd.grad(output, [dense, sparse], torch.randn(output.shape))
        return dict(zip(("output", "dense", "sparse"), (output.detach(), *gradients)))

    native, reference = compute(), by_reference(monkeypatch, compute)
    for name, value in reference.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(native[name], value, rtol=1e-6, atol=1e-6 * scale)


def test_vectors_of_a_list_are_read_where_they_are() -> None:
    """As the columns of one lookup of all tables, beside a tensor of its own."""
    dots, widths = DotInteraction(4), [3, 3, 3]
    dense, lookup, own = (torch.randn(5, width).requires_grad_() for width in (3, sum(widths), 3))
    factor = torch.randn(5, 3 + 10)

    def gradients(output: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((output * factor).sum(), [dense, lookup, own]))

    vectors = [*lookup.split(widths, dim=1), own]
    of_list, of_stack = dots(dense, vectors), dots(dense, torch.stack(vectors, dim=1))
    assert torch.equal(of_list, of_stack)
    pairs = zip(gradients(of_list), gradients(of_stack), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_operators_keep_the_rules_of_torch_library() -> None:
    attention, (target, items, history, parallel) = attention_case([2, 1], 4, [6, 3], 1, 4)
    score = [part for layer in attention.score[::2] for part in (layer.weight, layer.bias)]
    assert attention.parallel_map is not None
    lists = attention.parallel_map.weight
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = (target.requires_grad_(), items, history.index, history.offsets, parallel, lists)
    attend = torch.ops.recsys.target_attention.default
    torch.library.opcheck(attend, (*inputs, *score, True, False), test_utils=rules)
    dots = torch.ops.recsys.dot_interaction.default
    vectors = [torch.randn(2, 3, 4), torch.randn(2, 4)]
    torch.library.opcheck(dots, (target, vectors), test_utils=rules)


def test_torch_compile_sees_the_kernel_and_torch_export_the_reference() -> None:
    dots, inputs = DotInteraction(3), (torch.randn(2, 4), torch.randn(2, 3, 4))
    compiled = torch.compile(dots, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), native_dot_interaction(*inputs))
    exported = torch.export.export(dots, inputs)
    assert "recsys" not in str(exported.graph) and "bmm" in str(exported.graph)
