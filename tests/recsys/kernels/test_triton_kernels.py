"""Triton kernels equal PyTorch: on a GPU, or in Triton's interpreter, which needs triton alone.

pip install triton
TRITON_INTERPRET=1 python -m pytest tests/recsys/kernels/test_triton_kernels.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import choose_kernels
from recsys.kernels.choice import _KernelChoice
from recsys.ranking.dlrm import DotInteraction
from recsys.ranking.layers.target_attention import TargetAttention
from tests.ranks import require_gpus
from tests.recsys.kernels.operator_cases import CASES as OPERATORS
from tests.recsys.kernels.operator_cases import Inputs as OperatorInputs
from tests.recsys.kernels.operator_cases import backward_inputs, changed, mapped, tensors
from tests.recsys.kernels.test_native_kernels import CASES, attention_case, output_and_gradients

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")
from recsys.kernels import triton_attention, triton_dot_interaction

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [] if IS_INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    require_gpus(0 if IS_INTERPRETED else 1)
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    torch.manual_seed(0)


def assert_like(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6 + 1e-5 * scale)


@pytest.mark.parametrize(("num_fields", "dim"), [(1, 8), (4, 3), (26, 16), (20, 40)])
def test_dot_interaction_equals_the_reference(num_fields: int, dim: int) -> None:
    dense = torch.randn(3, dim, requires_grad=True)
    sparse = torch.randn(3, num_fields, dim, requires_grad=True)
    output = DotInteraction(num_fields)(dense, sparse)
    factor = torch.randn(output.shape)
    expected = torch.autograd.grad(output, [dense, sparse], factor)
    one, *rest_vectors = sparse.detach().to(DEVICE).unbind(1)
    parts = [one, torch.stack(rest_vectors, dim=1)] if rest_vectors else [one]
    inputs = dense.detach().to(DEVICE), parts
    assert_like(triton_dot_interaction.dot_interaction(*inputs), output)
    backward = triton_dot_interaction.dot_interaction_backward
    dense_gradient, part_gradients = backward(factor.to(DEVICE), *inputs)
    assert [part.shape for part in part_gradients] == [part.shape for part in parts]
    sparse_gradient = torch.cat([part.reshape(3, -1, dim) for part in part_gradients], dim=1)
    for pair in zip((dense_gradient, sparse_gradient), expected, strict=True):
        assert_like(*pair)


@pytest.mark.parametrize(
    ("lengths", "dim", "units", "num_parallel"),
    [([2, 0, 3], 4, [6, 3], 2), ([20, 1], 16, [64, 16], 1), ([0, 5], 10, [70, 20], 0)],
)
def test_attention_equals_the_reference(
    lengths: list[int], dim: int, units: list[int], num_parallel: int
) -> None:
    attention, places = TargetAttention(dim, num_parallel, units), sum(lengths)
    target = torch.randn(len(lengths), dim, requires_grad=True)
    items = torch.randn(7, dim, requires_grad=True)
    history = JaggedHistory.of(torch.randint(7, (places,)), torch.tensor(lengths), 7)
    parallel = torch.rand(places, num_parallel)
    output = attention(target, items, history, parallel)
    factor = torch.randn(output.shape)
    score = [part for layer in attention.score[::2] for part in (layer.weight, layer.bias)]
    lists = [] if attention.parallel_map is None else [attention.parallel_map.weight]
    expected = torch.autograd.grad(output, [target, items, *lists, *score], factor)
    inputs = [target, items, history.index, history.offsets, parallel]
    inputs += [*(lists or [torch.zeros(dim, 0)]), *score]
    inputs = [part.detach().to(DEVICE) for part in inputs]
    actual, shares, saved = triton_attention.target_attention(*inputs, False, False)
    assert_like(actual, output)
    by_kernel = triton_attention.target_attention_backward
    gradients = list(by_kernel(factor.to(DEVICE), shares, saved, *inputs[:-1], False))
    if not lists:
        assert gradients.pop(2).shape == (dim, 0)
    for pair in zip(gradients, expected[:-1], strict=True):
        assert_like(*pair)


def calls_of(operator: str) -> list[tuple[str, Callable[..., Any], OperatorInputs]]:
    """Return forward and backward of an operator, each with its name and inputs that fit."""
    torch.manual_seed(0)
    case = OPERATORS[operator]
    inputs = mapped(case.make(*case.shapes["usual"]), lambda _, part: part.to(DEVICE))
    module = triton_attention if operator == "target_attention" else triton_dot_interaction
    forward, backward = getattr(module, operator), getattr(module, f"{operator}_backward")
    outputs = forward(*inputs.values())
    backward_calls = backward_inputs(operator, inputs, outputs)
    backward(*backward_calls.values())
    return [(operator, forward, inputs), (f"{operator}_backward", backward, backward_calls)]


@pytest.mark.parametrize("operator", ["target_attention", "dot_interaction"])
def test_inputs_that_do_not_fit_are_refused_by_name(operator: str) -> None:
    for called, compute, inputs in calls_of(operator):
        for name, tensor in tensors(inputs).items():
            if name == "kept":  # of no size, and not read
                continue
            for wrong in (tensor.double(), tensor.int(), tensor.new_zeros([1] * 4)):
                with pytest.raises(RuntimeError, match=rf"recsys::{called}: {re.escape(name)} is "):
                    compute(*changed(inputs, name, wrong).values())


@pytest.mark.skipif(not IS_INTERPRETED, reason="on a GPU it ends the process's use of the GPU")
@pytest.mark.parametrize(("name", "number"), [("index", -1), ("index", 4), ("offsets", 9)])
def test_places_outside_of_the_items_are_refused_by_name(name: str, number: int) -> None:
    for called, compute, inputs in calls_of("target_attention"):
        outside = inputs[name].clone()
        outside[1] = number
        with pytest.raises(RuntimeError, match=rf"recsys::{called}: {name} is out of range"):
            compute(*(inputs | {name: outside}).values())


def test_dots_without_fields_are_the_dense_vector() -> None:
    dense = torch.randn(3, 5).to(DEVICE)
    assert torch.equal(triton_dot_interaction.dot_interaction(dense, []), dense)


def test_layers_compute_by_the_kernels_of_their_device() -> None:
    """Forward and backward through the operators: by Triton on a GPU, in C++ on CPU."""
    attention, inputs = attention_case(*CASES["long ones"], device=DEVICE)
    expected = output_and_gradients(attention, inputs)
    choose_kernels("native", DEVICE)
    actual = output_and_gradients(attention, inputs)
    assert not actual.pop("score.4.bias").any()
    for name, value in actual.items():
        assert_like(value, expected[name].cpu())
