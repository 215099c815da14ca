"""Each operator is right, or refuses by name, for every type of its inputs and at edge shapes."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.recsys.kernels.operator_cases import CASES, Case, Inputs, changed, mapped, tensors

pytestmark = pytest.mark.usefixtures("native_kernels")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
# Every type at the usual shape, and every shape in the types that a model has.
SHAPES = [
    (name, shape, floats, integers)
    for name, case in CASES.items()
    for shape in case.shapes
    for floats in FLOATS
    for integers in INTEGERS
    if shape == "usual" or (floats, integers) == (torch.float32, torch.int64)
]


def inputs_of(operator: str, shape: str) -> Inputs:
    torch.manual_seed(0)
    case = CASES[operator]
    return case.make(*case.shapes[shape])


def cast(inputs: Inputs, floats: torch.dtype, integers: torch.dtype) -> Inputs:
    def change(name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            return tensor
        return tensor.to(floats if tensor.is_floating_point() else integers)

    return mapped(inputs, change)


def with_leaves(case: Case, inputs: Inputs) -> Inputs:
    """Return inputs that require a gradient where the operator computes one."""

    def leaf(name: str, tensor: Tensor) -> Tensor:
        has_one = tensor.is_floating_point() and name not in case.without_gradient
        return tensor.detach().requires_grad_(has_one)

    return mapped(inputs, leaf)


def with_gradients(case: Case, inputs: Inputs, compute: Any) -> dict[str, Tensor]:
    """Return the result and the gradients of a weighted sum of it."""
    leaves = with_leaves(case, inputs)
    result = compute(leaves)
    variables = {name: tensor for name, tensor in tensors(leaves).items() if tensor.requires_grad}
    factor = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(
        (result * factor.to(result.dtype)).sum(), list(variables.values()), materialize_grads=True
    )
    return {"result": result.detach()} | dict(zip(variables, gradients, strict=True))


@pytest.mark.parametrize(("operator", "shape", "floats", "integers"), SHAPES, ids=str)
def test_results_and_gradients_equal_plain_operations(
    operator: str, shape: str, floats: torch.dtype, integers: torch.dtype
) -> None:
    case, inputs = CASES[operator], cast(inputs_of(operator, shape), floats, integers)
    expected = with_gradients(case, cast(inputs, torch.float64, torch.int64), case.reference)
    actual = with_gradients(case, inputs, case.native)
    precision = 4 * torch.finfo(floats).eps if floats != torch.float32 else 1e-5
    for name, value in expected.items():
        computes_in_float32 = name == "result" and operator == "content_interest"
        assert actual[name].dtype == (torch.float32 if computes_in_float32 else floats), name
        scale = max([1.0, *value.abs().flatten().tolist()])
        torch.testing.assert_close(
            actual[name].double(), value, rtol=0, atol=precision * scale, msg=name
        )


@pytest.mark.parametrize("operator", CASES)
def test_inputs_of_float64_and_whole_numbers_are_refused_by_name(operator: str) -> None:
    case, usual = CASES[operator], inputs_of(operator, "usual")
    for name, tensor in tensors(usual).items():
        if name in ("mask", "noise"):
            continue
        wrong = torch.float64 if tensor.is_floating_point() else torch.float32
        for dtype in (wrong, torch.int16, torch.bool, torch.complex64):
            inputs = changed(usual, name, tensor.to(dtype))
            with pytest.raises(ValueError, match=rf"recsys::{operator}: {re.escape(name)} is "):
                case.native(inputs)
        with pytest.raises(RuntimeError, match=rf"recsys::{operator}: "):
            case.native(changed(usual, name, tensor.new_zeros([1] * 4)))


@pytest.mark.parametrize("operator", CASES)
def test_a_second_derivative_is_refused_by_name(operator: str) -> None:
    case = CASES[operator]
    inputs = with_leaves(case, inputs_of(operator, "usual"))
    variables = [tensor for tensor in tensors(inputs).values() if tensor.requires_grad]
    result = case.native(inputs)
    gradients = torch.autograd.grad(result.square().sum(), variables, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(RuntimeError, match=f"recsys::{operator} has no second derivative"):
        torch.autograd.grad(penalty + variables[0].sum(), variables)


@pytest.mark.parametrize("operator", ["target_attention", "content_interest"])
def test_an_input_without_gradient_that_requires_one_is_refused(operator: str) -> None:
    case = CASES[operator]
    for name in case.without_gradient:
        inputs = with_leaves(case, inputs_of(operator, "usual"))
        inputs[name].requires_grad_()
        with pytest.raises(ValueError, match=rf"recsys::{operator}: {name} requires a gradient"):
            case.native(inputs)


@pytest.mark.parametrize("operator", CASES)
def test_a_result_that_nothing_reads_gives_no_gradient(operator: str) -> None:
    """As of a loss that a function between stops."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, result: Tensor) -> Tensor:
            return result.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    case = CASES[operator]
    inputs = with_leaves(case, inputs_of(operator, "usual"))
    variables = [tensor for tensor in tensors(inputs).values() if tensor.requires_grad]
    stopped = Stop.apply(case.native(inputs)).sum()
    gradients = torch.autograd.grad(stopped, variables, materialize_grads=True)
    assert not any(gradient.any() for gradient in gradients)


# Shapes of several groups of rows or items, which threads share.
MANY: dict[str, tuple[Any, ...]] = {
    "target_attention": ([7, 0, 12, 3] * 300, 50, 4, 8, 4, 1),
    "content_interest": ([7, 0, 8, 3] * 50, 3000, 8, 1, 1),
    "fusion": (300, [0, 1], 2, 2, 32),
    "dot_interaction": (600, 16, [26]),
}


@pytest.mark.parametrize("operator", CASES)
def test_results_are_equal_to_the_last_bit_for_one_thread_and_two(operator: str) -> None:
    torch.manual_seed(0)
    case = CASES[operator]
    inputs, results = case.make(*MANY[operator]), []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(with_gradients(case, inputs, case.native))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_what_is_computed_again_equals_what_is_saved_for_the_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, inputs = CASES["target_attention"], inputs_of("target_attention", "long")
    saved = with_gradients(case, inputs, case.native)
    monkeypatch.setattr("recsys.kernels.target_attention.MAX_UNIT_BYTES", 0)
    again = with_gradients(case, inputs, case.native)
    torch.testing.assert_close(again, saved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operator", CASES)
def test_operators_keep_the_rules_of_torch_library(operator: str) -> None:
    inputs = with_leaves(CASES[operator], inputs_of(operator, "usual"))
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    function = getattr(torch.ops.recsys, operator).default
    torch.library.opcheck(function, tuple(inputs.values()), test_utils=rules)


@pytest.mark.parametrize("operator", ["target_attention", "content_interest"])
@pytest.mark.parametrize("item", [-1, 2**40])
def test_an_index_outside_of_the_items_is_an_error(operator: str, item: int) -> None:
    inputs = inputs_of(operator, "usual")
    inputs["index"][1] = item
    with pytest.raises(RuntimeError, match=rf"recsys::{operator}: .*index\[1\] is {item}"):
        CASES[operator].native(inputs)
