"""Modules of every float type give results of their type, by kernels and by PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.config import HistorySettings
from recsys.content.fusion import FusionQFormer
from recsys.content.vectors import ContentVectors, StoredHistory
from recsys.data.jagged_history import JaggedHistory
from recsys.kernels.choice import _KernelChoice
from recsys.ranking.dlrm import DotInteraction
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.target_attention import DotAttention, HistoryAttention, TargetAttention

pytestmark = pytest.mark.usefixtures("native_kernels")

HISTORY = JaggedHistory.of(torch.tensor([1, 0, 1, 2, 2, 0]), torch.tensor([2, 0, 4]), 3)
PARALLEL = torch.rand(6, 1, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True, True], [True, False], [False, True]])
Module = tuple[nn.Module, list[Tensor], Callable[..., Tensor]]  # its vectors, and the call


def attention(module: HistoryAttention, lists: int) -> Module:
    vectors = [torch.randn(3, 4), torch.randn(3, 4)]
    parallel = torch.rand(6, lists)
    return module, vectors, lambda *vectors_: module(*vectors_, HISTORY, parallel)


def content_interest(num_bins: int) -> Module:
    settings = HistorySettings(similarity_features=True, simtier_bins=num_bins)
    module, rows = ContentInterest(4, 1, 1, settings), torch.randn(3, 8)

    def interest(target: Tensor, modality_tokens: Tensor, matrix: Tensor) -> Tensor:
        vectors, modalities = rows.to(matrix).split(4, dim=1)
        items, stored = (vectors @ matrix.T, modalities.unsqueeze(1)), StoredHistory(rows, matrix)
        read = {"read": lambda: items, "read_stored": lambda: stored}
        return module(
            ContentVectors(target, None, modality_tokens, None, **read), HISTORY, PARALLEL
        )

    return module, [torch.randn(3, 4), torch.randn(3, 1, 4), torch.randn(4, 4)], interest


def fusion(preset: Any) -> Module:
    module, modality = FusionQFormer(4, 2, 2, 2, 2, 0.0, preset), torch.tensor([0, 1])
    for parameter in module.parameters():  # zeros at the start would hide errors
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return module, [torch.randn(3, 2, 4)], lambda tokens: module(tokens, MASK, modality)


MODULES: dict[str, Callable[[], Module]] = {
    "target attention": lambda: attention(TargetAttention(4, 0, [6, 3]), 0),
    "target attention with a list": lambda: attention(TargetAttention(4, 1, [6, 3]), 1),
    "target attention of another depth": lambda: attention(TargetAttention(4, 1, [6]), 1),
    "dot attention": lambda: attention(DotAttention(4, 0), 0),
    "dot attention with a list": lambda: attention(DotAttention(4, 1), 1),
    "content interest": lambda: content_interest(0),
    "content interest with a histogram": lambda: content_interest(3),
    "fusion, modern": lambda: fusion("modern"),
    "fusion, published": lambda: fusion("published"),
    "dots": lambda: (
        module := DotInteraction(2),
        [torch.randn(3, 4), torch.randn(3, 2, 4)],
        module,
    ),
}


def results(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the result and all gradients, of numbers that are the same in every type."""
    torch.manual_seed(0)
    module, vectors, compute = MODULES[name]()
    module.bfloat16().to(dtype)
    leaves = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in vectors]
    result = compute(*leaves)
    factor = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    variables = {f"vectors {index}": tensor for index, tensor in enumerate(leaves)}
    variables |= dict(module.named_parameters())
    gradients = torch.autograd.grad(
        (result * factor).sum(), list(variables.values()), materialize_grads=True
    )
    return {"result": result.detach()} | dict(zip(variables, gradients, strict=True))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_any_type_equals_that_of_float64_and_gives_its_type(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, kernels: str
) -> None:
    monkeypatch.setattr(_KernelChoice, "kernels", kernels)
    expected, actual = results(name, torch.float64), results(name, dtype)
    precision = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for key, value in expected.items():
        assert (value.dtype, actual[key].dtype) == (torch.float64, dtype)
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            actual[key].double(), value, rtol=0, atol=precision * scale, msg=key
        )


@pytest.mark.parametrize("name", MODULES)
def test_in_float64_first_and_second_derivatives_are_right(name: str) -> None:
    torch.manual_seed(0)
    module, vectors, compute = MODULES[name]()
    module.double()
    leaves = tuple(tensor.double().requires_grad_() for tensor in vectors)
    assert torch.autograd.gradcheck(compute, leaves)
    assert torch.autograd.gradgradcheck(compute, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["fusion, modern", "fusion, published", "dots"])
def test_forward_mode_derivatives_are_those_of_plain_operations(name: str) -> None:
    torch.manual_seed(0)
    module, vectors, compute = MODULES[name]()
    module.double()
    doubles = tuple(tensor.double() for tensor in vectors)
    directions = tuple(torch.randn_like(tensor) for tensor in doubles)
    expected = torch.func.jvp(compute, doubles, directions)[1]
    module.float()
    floats = tuple(tensor.float() for tensor in directions)
    actual = torch.func.jvp(compute, tuple(vectors), floats)[1]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
