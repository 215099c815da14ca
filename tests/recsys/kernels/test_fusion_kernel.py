"""The kernel of the Fusion-Q-Former equals the operations of its layers, with all gradients."""

import pytest
import torch
from torch import Tensor

from recsys.content.fusion import FusionQFormer
from recsys.kernels.choice import _KernelChoice

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
    case_inputs = Case(*CASES[case])
    native = case_inputs.results()
    torch.set_num_threads(2)
    for name, value in case_inputs.results().items():
        assert torch.equal(value, native[name]), name
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    reference = case_inputs.results()
    for name, value in reference.items():
        size = 1e-6 if name == "output" else 1e-5
        # A number added to all keys changes no softmax: that gradient is zero, but for rounding.
        like = reference[name.replace("key.bias", "key.weight")]
        highest = max(1.0, like.abs().max().item()) if like.numel() else 1.0
        torch.testing.assert_close(native[name], value, rtol=0, atol=size * highest, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_without_training_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    case_inputs = Case(*CASES[case])
    case_inputs.fusion.eval()
    inputs = case_inputs.tokens, case_inputs.mask, case_inputs.modality
    assert case_inputs.fusion._has_kernel(case_inputs.tokens)
    with torch.no_grad():
        native = case_inputs.fusion(*inputs)
        monkeypatch.setattr(_KernelChoice, "kernels", "torch")
        reference = case_inputs.fusion(*inputs)
    highest = max(1.0, float(reference.abs().max())) if reference.numel() else 1.0
    torch.testing.assert_close(native, reference, rtol=0, atol=1e-6 * highest)


def test_nan_stays_nan() -> None:
    case_inputs = Case(3, [0, 1], 2, 1, 8, 2, 0.0)
    case_inputs.mask[:2] = True
    case_inputs.tokens.data[0, 1, 2] = torch.nan
    output = case_inputs.fusion(case_inputs.tokens, case_inputs.mask, case_inputs.modality)
    assert output[0].isnan().all() and not output[1:].isnan().any()
