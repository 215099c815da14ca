"""Without kernels, the dot interaction gives TorchRec's outputs and gradients to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.dlrm import InteractionArch

from recsys.kernels.choice import _KernelChoice
from recsys.plug_in.interactions import DotProducts
from recsys.ranking.dlrm import DotInteraction


def outputs_and_gradients(module: nn.Module, num_fields: int) -> list[Tensor]:
    """Output [5, D + I], and the gradients of dense [5, 8] and sparse [5, F, 8]."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 8, generator=generator).requires_grad_()
    sparse = torch.randn(5, num_fields, 8, generator=generator).requires_grad_()
    output = module(dense, sparse)
    output.backward(torch.randn(output.shape, generator=generator))
    assert dense.grad is not None and sparse.grad is not None
    return [output, dense.grad, sparse.grad]


@pytest.mark.parametrize("num_fields", [1, 4, 26])
def test_outputs_and_gradients_are_torchrecs_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, num_fields: int
) -> None:
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    ours = outputs_and_gradients(DotInteraction(num_fields), num_fields)
    torchrecs = outputs_and_gradients(InteractionArch(num_fields), num_fields)
    assert all(torch.equal(*pair) for pair in zip(ours, torchrecs, strict=True))


def test_it_has_no_state_so_that_checkpoints_of_torchrecs_dlrm_load() -> None:
    assert not DotInteraction(3).state_dict()


class Doubled(InteractionArch):
    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        return 2 * super().forward(dense_features, sparse_features)


def test_the_plug_in_keeps_the_interaction_of_a_subclass() -> None:
    dense, sparse, vectors = torch.rand(2, 4), torch.rand(2, 3, 4), torch.rand(2, 1, 4)
    doubled, own = (
        DotProducts(of(3), 1)(dense, sparse, vectors) for of in (Doubled, InteractionArch)
    )
    assert torch.equal(doubled[0], 2 * own[0])
    assert torch.equal(doubled[1], own[1])
