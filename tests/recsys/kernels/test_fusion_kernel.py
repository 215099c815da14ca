"""The kernel of the Fusion-Q-Former equals the operations of its layers, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys.content.fusion import FusionQFormer
from recsys.kernels.choice import _Chosen

pytestmark = pytest.mark.usefixtures("native_kernels")

# Items, modality of each token, queries, layers, D, heads, dropout.
CASES = {
    "as in a recipe": (40, [0, 1], 2, 2, 64, 4, 0.1),
    "several groups": (300, [0, 1], 2, 2, 32, 2, 0.1),
    "no width of a vector": (5, [0, 0, 2], 1, 1, 18, 3, 0.0),
    "many tokens, three layers": (3, [1, 0, 1, 1, 0], 3, 3, 12, 1, 0.5),
    "no items": (0, [0], 2, 1, 8, 2, 0.1),
}


class Case:
    """A fusion, and tokens of which some are missing; the last item has none."""

    def __init__(
        self,
        items: int,
        modality: list[int],
        queries: int,
        layers: int,
        dim: int,
        heads: int,
        dropout: float,
    ) -> None:
        torch.manual_seed(0)
        self.modality = torch.tensor(modality)
        self.fusion = FusionQFormer(dim, max(modality) + 1, queries, layers, heads, dropout)
        for parameter in self.fusion.parameters():  # zeros at the start would hide errors
            parameter.data += 0.2 * torch.randn(parameter.shape)
        self.tokens = torch.randn(items, len(modality), dim).requires_grad_()
        self.mask = torch.rand(items, len(modality)) < 0.7
        self.mask[-1:] = False

    def results(self) -> dict[str, Tensor]:
        torch.manual_seed(1)  # of dropout
        variables = {"tokens": self.tokens} | dict(self.fusion.named_parameters())
        output = self.fusion(self.tokens, self.mask, self.modality)
        factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad((output * factor).sum(), list(variables.values()))
        return {"output": output} | dict(zip(variables, gradients))


@pytest.mark.parametrize("case", CASES)
def test_fusion_equals_the_reference(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    these = Case(*CASES[case])
    native = these.results()
    torch.set_num_threads(2)
    for name, value in these.results().items():
        assert torch.equal(value, native[name]), name
    monkeypatch.setattr(_Chosen, "kernels", "torch")
    reference = these.results()
    for name, value in reference.items():
        size = 1e-6 if name == "output" else 1e-5
        # A number added to all keys changes no softmax: that gradient is zero, but for rounding.
        like = reference[name.replace("key.bias", "key.weight")]
        highest = max(1.0, like.abs().max().item()) if like.numel() else 1.0
        torch.testing.assert_close(native[name], value, rtol=0, atol=size * highest, msg=name)


def test_gradients_of_the_reference_are_right() -> None:
    these = Case(2, [0, 1], 1, 2, 4, 2, 0.0)
    fusion, tokens = these.fusion.double(), these.tokens.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fusion(x, these.mask, these.modality), (tokens,))


def test_nan_stays_nan() -> None:
    these = Case(3, [0, 1], 2, 1, 8, 2, 0.0)
    these.mask[:2] = True
    these.tokens.data[0, 1, 2] = torch.nan
    output = these.fusion(these.tokens, these.mask, these.modality)
    assert output[0].isnan().all() and not output[1:].isnan().any()


def test_bfloat16_gives_the_type_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    these = Case(3, [0, 1], 2, 1, 8, 2, 0.0)
    outputs = []
    for kernels in ("auto", "torch"):
        monkeypatch.setattr(_Chosen, "kernels", kernels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(these.fusion(these.tokens.bfloat16(), these.mask, these.modality))
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=0.03, atol=0.03)


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    these = Case(3, [0, 1, 1], 2, 2, 130, 2, 0.1)
    noise, weights = torch.rand(2 * 3 * (5 + 2) * 130), these.fusion.weights()
    inputs = (these.tokens, these.mask, these.modality, noise, weights, 2, 2, 0.5, 0.1, False)
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.recsys.fusion.default, inputs, test_utils=rules)
