"""The kernel of Content-ID-Contrastive equals PyTorch's operations, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys.config import ContrastiveSettings
from recsys.kernels import contrastive
from recsys.kernels.choice import _Chosen
from recsys.model.losses import ContentIDContrastive

pytestmark = pytest.mark.usefixtures("native_kernels")

# Rows, D, distinct items, padding rows, normalised, temperature.
CASES = {
    "items that occur twice, padding rows": (20, 8, 6, 3, True, 0.1),
    "several groups of blocks": (600, 16, 400, 5, True, 0.05),
    "no width of a vector, not normalised": (33, 11, 40, 0, False, 1.0),
    "large logits": (40, 6, 40, 0, False, 0.01),
    "one item alone": (5, 4, 1, 0, True, 0.1),
    "one row": (1, 4, 9, 0, True, 0.1),
    "padding rows alone": (4, 4, 3, 4, True, 0.1),
}


class Case:
    def __init__(
        self, rows: int, dim: int, items: int, padding: int, normalize: bool, temperature: float
    ) -> None:
        torch.manual_seed(0)
        settings = ContrastiveSettings(
            weight=1.0,
            dim=dim,
            normalize=normalize,
            temperature=temperature,
            learn_temperature=True,
        )
        self.loss = ContentIDContrastive(5, 7, settings)
        self.content, self.ids = torch.randn(rows, 5), torch.randn(rows, 7)
        self.items = torch.randint(items, (rows,)) + 2**40
        self.weights = torch.rand(rows)
        self.weights[rows - padding :] = 0

    def results(self) -> dict[str, Tensor]:
        variables = {"content": self.content.requires_grad_(), "ids": self.ids.requires_grad_()}
        variables |= dict(self.loss.named_parameters())
        loss = self.loss(self.content, self.ids, self.items, self.weights)
        return {"loss": loss} | dict(
            zip(variables, torch.autograd.grad(loss, list(variables.values())))
        )


@pytest.mark.parametrize("keeps_logits", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_loss_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, case: str, keeps_logits: bool
) -> None:
    these = Case(*CASES[case])
    if not keeps_logits:
        monkeypatch.setattr(contrastive, "MAX_KEPT_BYTES", 0)
    native = these.results()
    torch.set_num_threads(2)
    for name, value in these.results().items():
        assert torch.equal(value, native[name]), name
    monkeypatch.setattr(_Chosen, "kernels", "torch")
    reference = these.results()
    for name, value in reference.items():
        size = 1e-6 if name == "loss" else 1e-5
        highest = max(1.0, value.abs().max().item())
        torch.testing.assert_close(native[name], value, rtol=0, atol=size * highest, msg=name)


def test_gradients_of_the_reference_are_right() -> None:
    these = Case(4, 3, 3, 1, True, 0.5)
    loss, items, weights = these.loss.double(), these.items, these.weights.double()
    sides = (these.content.double().requires_grad_(), these.ids.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda c, i: loss(c, i, items, weights), sides)


def test_nan_stays_nan() -> None:
    these = Case(6, 4, 6, 0, True, 0.1)
    these.content[2] = torch.nan
    assert these.loss(these.content, these.ids, these.items).isnan()


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    sides = [torch.randn(130, 6, requires_grad=True) for _ in range(2)]
    inputs = (*sides, torch.arange(130), torch.tensor(2.0, requires_grad=True), True, True)
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.recsys.in_batch_contrastive.default
    torch.library.opcheck(operator, inputs, test_utils=rules)
