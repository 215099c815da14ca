"""Native kernels equal the PyTorch reference, to the last bit in every run and for all threads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import native_dot_interaction
from recsys.kernels.choice import _KernelChoice
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
) -> tuple[TargetAttention, Inputs]:
    torch.manual_seed(0)
    num_positions = sum(lengths)
    history = JaggedHistory.of(
        torch.randint(num_items, (num_positions,)), torch.tensor(lengths), num_items
    )
    target, items = torch.randn(len(lengths), dim), torch.randn(num_items, dim)
    parallel = torch.rand(num_positions, num_parallel)
    return TargetAttention(dim, num_parallel, units), (target, items, history, parallel)


def output_and_gradients(attention: TargetAttention, inputs: Inputs) -> dict[str, Tensor]:
    target, items = (tensor.detach().clone().requires_grad_() for tensor in inputs[:2])
    output = attention(target, items, *inputs[2:])
    factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    variables = {"target": target, "items": items, **dict(attention.named_parameters())}
    gradients = torch.autograd.grad(
        (output * factor).sum(), list(variables.values()), allow_unused=False
    )
    return {"output": output.detach(), **dict(zip(variables, gradients, strict=True))}


def by_reference(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    with monkeypatch.context() as context:
        context.setattr(_KernelChoice, "kernels", "torch")
        return compute()


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
    for key in ("output", "target", "items", "score.0.weight"):
        assert torch.equal(native[key].isnan(), reference[key].isnan()), key


def test_a_row_s_interest_does_not_depend_on_the_rows_beside_it() -> None:
    attention, (target, items, history, parallel) = attention_case([3, 40, 2], 6, [9, 5], 1, 30)
    alone = JaggedHistory.of(history.index[3:43], torch.tensor([40]), 30)
    with torch.no_grad():
        together = attention(target, items, history, parallel)
        assert torch.equal(together[1:2], attention(target[1:2], items, alone, parallel[3:43]))


def test_under_autocast_and_of_bfloat16_the_results_have_the_types_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention, (target, items, *events) = attention_case([5, 2], 8, [16, 4], 1, 6)
    dots, sparse = DotInteraction(2), torch.randn(2, 2, 8)

    def compute() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            cases = {"float": attention(target, items, *events), "dots": dots(target, sparse)}
            half = target.bfloat16()
            cases["bfloat"] = attention(half, items.bfloat16(), *events)
            return cases | {"dots of bfloat": dots(half, sparse)}

    native, reference = compute(), by_reference(monkeypatch, compute)
    for name, value in reference.items():
        assert native[name].dtype == value.dtype, name
        torch.testing.assert_close(native[name], value, rtol=0.05, atol=0.05)


def test_torch_compile_sees_the_kernel_and_torch_export_the_reference() -> None:
    dots, inputs = DotInteraction(3), (torch.randn(2, 4), torch.randn(2, 3, 4))
    compiled = torch.compile(dots, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), native_dot_interaction(*inputs))
    exported = torch.export.export(dots, inputs)
    assert "recsys" not in str(exported.graph) and "bmm" in str(exported.graph)
