"""The kernel of a layer of the fusion equals the layer's own operations, with all gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from recsys.content.fusion import FusionQFormer, ModernLayer
from recsys.kernels import has_native
from recsys.kernels.choice import _Chosen

# Items, tokens of an item, outputs of it, D, heads, dropout.
CASES = {
    "as in a recipe, blocks of one group": (40, 4, 2, 64, 4, 0.1),
    "several groups": (300, 4, 4, 32, 2, 0.1),
    "no width of a vector": (5, 3, 1, 18, 3, 0.0),
    "one item with many tokens": (1, 8, 3, 12, 1, 0.5),
    "no items": (0, 3, 1, 8, 2, 0.1),
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    if not has_native(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer_of(dim: int, heads: int, dropout: float) -> ModernLayer:
    torch.manual_seed(0)
    layer = ModernLayer(dim, heads, dropout)
    for parameter in layer.parameters():  # biases start as zero, which would hide errors
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return layer


def results(layer: ModernLayer, x: Tensor, mask: Tensor, num_outputs: int) -> dict[str, Tensor]:
    torch.manual_seed(1)  # of dropout
    variables = {"x": x} | dict(layer.named_parameters())
    output = layer(x, mask, num_outputs)
    factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((output * factor.to(x)).sum(), list(variables.values()))
    return {"output": output} | dict(zip(variables, gradients))


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_the_reference(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    items, tokens, num_outputs, dim, heads, dropout = CASES[case]
    layer = layer_of(dim, heads, dropout)
    x = torch.randn(items, tokens, dim).requires_grad_()
    mask = torch.rand(items, tokens) < 0.7
    mask[:, 0] = True
    native = results(layer, x, mask, num_outputs)
    torch.set_num_threads(2)
    again = results(layer, x, mask, num_outputs)
    for name, value in native.items():
        assert torch.equal(value, again[name]), name
    monkeypatch.setattr(_Chosen, "kernels", "torch")
    reference = results(layer, x, mask, num_outputs)
    for name, value in reference.items():
        size = 1e-6 if name == "output" else 1e-5
        # A number added to all keys changes no softmax: that gradient is zero, but for rounding.
        like = reference["attention.key.weight"] if name == "attention.key.bias" else value
        highest = max(1.0, like.abs().max().item()) if like.numel() else 1.0
        torch.testing.assert_close(native[name], value, rtol=0, atol=size * highest, msg=name)


def test_gradients_of_the_reference_are_right() -> None:
    layer = layer_of(4, 2, 0.0).double()
    x, mask = torch.randn(2, 3, 4).double().requires_grad_(), torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    assert torch.autograd.gradcheck(lambda x: layer(x, mask, 2), (x,))


def test_nan_stays_nan() -> None:
    layer = layer_of(8, 2, 0.0)
    x = torch.randn(2, 3, 8)
    x[0, 1, 2] = torch.nan
    output = layer(x, torch.ones(2, 3, dtype=torch.bool), 2)
    assert output[0].isnan().all() and not output[1].isnan().any()


def test_bfloat16_gives_the_type_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fusion = FusionQFormer(8, num_modalities=2, num_heads=2, dropout=0.0)
    tokens, mask = torch.randn(3, 2, 8).bfloat16(), torch.ones(3, 2, dtype=torch.bool)

    def fused() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output: Tensor = fusion(tokens, mask, torch.arange(2))
        return output

    native = fused()
    monkeypatch.setattr(_Chosen, "kernels", "torch")
    torch.testing.assert_close(native, fused(), rtol=0.02, atol=0.02)


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    layer = layer_of(130, 2, 0.1)
    x, mask = torch.randn(3, 4, 130, requires_grad=True), torch.ones(3, 4, dtype=torch.bool)
    inputs = (x, mask, torch.rand(2, 3, 2, 130), layer.weights(), 2, 2, 0.5, 0.1)
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.recsys.fusion_layer.default
    torch.library.opcheck(operator, inputs, test_utils=rules)
