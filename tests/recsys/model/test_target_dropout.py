"""A target that counts as new in training: what the ranking model and the losses read of it."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys.model.em3 import EM3
from recsys.ranking.vectors import IDVectors

ROWS, DIM, SHARE = 200, 4, 0.3


class Recorder(nn.Module):
    """Keeps the arguments of its last call and returns the result that it was made with."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result, self.inputs = result, ()

    def forward(self, *inputs: Any) -> Any:
        self.inputs = inputs
        return self.result


class Votes(Recorder):
    blend = staticmethod(lambda scored, neighbours: scored)


def scored(training: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the targets [B, D] that the ranking model and the losses read, and the newness."""
    torch.manual_seed(0)
    ids = IDVectors([], torch.ones(ROWS, DIM), torch.ones(1, DIM))
    ranking, losses = Recorder(torch.zeros(ROWS, 1)), Recorder((torch.zeros(()), {}, None))
    votes = Votes(SimpleNamespace(batch=None))
    modules = cast(Any, (None, nn.Identity(), None, nn.Identity(), ranking, losses))
    model = EM3(*modules, neighbours=cast(Any, votes), target_dropout=SHARE).train(training)
    model._scored(ids, None, cast(Any, None))
    return ranking.inputs[0].target, losses.inputs[1].target, votes.inputs[2]


def test_rows_whose_target_counts_as_new_rank_without_its_vector_and_votes() -> None:
    ranked, in_losses, newness = scored(training=True)
    assert newness is not None
    is_new = newness < SHARE
    assert 0.2 < is_new.float().mean() < 0.4
    assert torch.equal(ranked, (~is_new).float().unsqueeze(1).expand(-1, DIM))
    assert torch.equal(in_losses, torch.ones(ROWS, DIM))  # CIC pulls at the vector itself


def test_in_evaluation_every_target_has_its_vector() -> None:
    ranked, _, newness = scored(training=False)
    assert newness is None
    assert torch.equal(ranked, torch.ones(ROWS, DIM))
