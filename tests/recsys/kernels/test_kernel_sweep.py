"""Each operator is right, or refuses by name, for every type of its inputs and at edge shapes."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.recsys.kernels.operator_cases import CASES, Case, Inputs, changed, mapped, tensors

pytestmark = pytest.mark.usefixtures("native_kernels")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
SHAPES = [(name, shape) for name, case in CASES.items() for shape in case.shapes]


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
    variables = {name: part for name, part in tensors(leaves).items() if part.requires_grad}
    factor = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(
        (result * factor.to(result.dtype)).sum(), list(variables.values()), materialize_grads=True
    )
    return {"result": result.detach()} | dict(zip(variables, gradients, strict=True))


@pytest.mark.parametrize("integers", INTEGERS, ids=str)
@pytest.mark.parametrize("floats", FLOATS, ids=str)
@pytest.mark.parametrize(("operator", "shape"), SHAPES)
def test_results_and_gradients_equal_plain_operations(
    operator: str, shape: str, floats: torch.dtype, integers: torch.dtype
) -> None:
    case, inputs = CASES[operator], cast(inputs_of(operator, shape), floats, integers)
    expected = with_gradients(case, cast(inputs, torch.float64, torch.int64), case.reference)
    found = with_gradients(case, inputs, case.native)
    precision = 4 * torch.finfo(floats).eps if floats != torch.float32 else 1e-5
    for name, value in expected.items():
        computes_in_float32 = name == "result" and operator == "content_interest"
        assert found[name].dtype == (torch.float32 if computes_in_float32 else floats), name
        scale = max([1.0, *value.abs().flatten().tolist()])
        torch.testing.assert_close(
            found[name].double(), value, rtol=0, atol=precision * scale, msg=name
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


def test_calls_that_do_not_fit_are_refused_by_name_and_end_no_process() -> None:
    command = [sys.executable, "-m", "tests.recsys.kernels.hostile_calls"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended in: {lines[-1:]}\n{done.stderr}"
    assert {line.split(":")[0] for line in lines} >= {
        *CASES,
        *(f"{name}_backward" for name in CASES),
    }
    assert [pair for pair in pairwise(lines) if pair[1].startswith("WRONG")] == []


@pytest.mark.parametrize("operator", CASES)
def test_a_second_derivative_is_refused_by_name(operator: str) -> None:
    case = CASES[operator]
    inputs = with_leaves(case, inputs_of(operator, "usual"))
    variables = [part for part in tensors(inputs).values() if part.requires_grad]
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
def test_a_forward_mode_derivative_is_refused_by_name(operator: str) -> None:
    case, inputs = CASES[operator], inputs_of(operator, "usual")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"recsys::{operator} has no"):
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
    variables = [part for part in tensors(inputs).values() if part.requires_grad]
    stopped = Stop.apply(case.native(inputs)).sum()
    gradients = torch.autograd.grad(stopped, variables, materialize_grads=True)
    assert not any(gradient.any() for gradient in gradients)
