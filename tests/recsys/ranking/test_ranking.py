"""DIN with a DCN-v2 head: against plain PyTorch, its ID-only twin, and independence of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from recsys import ranking
from recsys.config import ContentSettings, RankingSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.model.build import build_ranking
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.din import DinDcn, DinDcnSettings
from recsys.ranking.layers.fields import history_numbers
from recsys.ranking.vectors import IDVectors
from tests.recsys.ranking.ranking_inputs import (
    CONTENT,
    DIMENSIONS,
    ID_DIM,
    LENGTHS,
    inputs,
    one_row,
)

SETTINGS = DinDcnSettings(attention_units=[5], cross_layers=2, cross_rank=3, mlp_units=[7, 5])


def model_of(
    content: ContentSettings | None = CONTENT, dimensions: InputDimensions = DIMENSIONS
) -> DinDcn:
    torch.manual_seed(0)
    model = build_ranking(SETTINGS, dimensions, content)
    assert isinstance(model, DinDcn)
    return model.eval()


@pytest.mark.parametrize("content", [CONTENT, None])
def test_a_row_s_logits_do_not_depend_on_the_other_rows_or_their_padding(
    content: ContentSettings | None,
) -> None:
    model, parts = model_of(content), inputs()
    together = model(*parts)
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(model(*one_row(parts, row))[0], together[row])


def test_logits_are_the_mlp_of_the_cross_network_of_all_vectors() -> None:
    model, parts = model_of(), inputs()
    ids, content, batch = one_row(parts, 2)
    assert model.content_interest is not None
    values, history = batch.history_values, batch.jagged_history()
    vectors = [
        batch.dense_features,
        *ids.pooled,
        ids.target,
        model.interest(ids.target, ids.history, history, values),
        history_numbers(history, values),
        content.target,
        model.content_interest(content, history, values),
    ]
    x0 = torch.cat(vectors, dim=1)
    x = x0
    for v, w, bias in zip(model.cross.V_kernels, model.cross.W_kernels, model.cross.bias):
        x = x0 * ((x @ v.T) @ w.T + bias) + x  # DCN-v2, low rank
    linears = [layer for layer in model.mlp if isinstance(layer, nn.Linear)]
    for layer in linears[:-1]:
        x = torch.relu(x @ layer.weight.T + layer.bias)
    expected = x @ linears[-1].weight.T + linears[-1].bias
    torch.testing.assert_close(model(ids, content, batch), expected, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_gradient() -> None:
    model = model_of()
    model(*inputs()).sum().backward()
    # The last score's bias shifts all of a softmax and so has none.
    expected_none = {"interest.score.2.bias"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.abs().max() > 1e-7) != (name in expected_none), name


def test_the_id_only_twin_is_the_same_parts_without_content() -> None:
    twin, model = model_of(None), model_of()
    ids, content, batch = inputs()
    assert torch.equal(twin(ids, content, batch), twin(ids, None, batch))
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    twin_names = {name.split(".")[0] for name, _ in twin.named_parameters()}
    assert names - twin_names == {"content_interest"}
    assert not torch.allclose(model(ids, content, batch), model(ids, inputs(seed=1)[1], batch))


@pytest.mark.parametrize("num_labels", [1, 3])
def test_there_is_one_logit_per_label(num_labels: int) -> None:
    model = model_of(dimensions=replace(DIMENSIONS, num_labels=num_labels))
    assert model(*inputs()).shape == (len(LENGTHS), num_labels)


def test_a_model_without_pooled_dense_parallel_or_history_still_ranks() -> None:
    model = model_of(dimensions=InputDimensions([], ID_DIM, 0, 0, 1))
    ids, content, batch = inputs(torch.tensor([0, 0]))
    batch = replace(batch, dense_features=torch.zeros(2, 0), history_values=torch.zeros(0, 0))
    logits = model(IDVectors([], ids.target, ids.history), content, batch)
    assert logits.shape == (2, 1) and torch.isfinite(logits).all()


def test_an_unknown_ranking_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"ranking.name 'gbdt' is unknown; .*'din_dcn'"):
        build_ranking(RankingSettings(name="gbdt"), DIMENSIONS, None)


class TargetNorm(nn.Module):
    """A user's own ranking model."""

    def __init__(self, settings: object, dimensions: object, content: object) -> None:
        super().__init__()

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Tensor:
        return ids.target.norm(dim=1, keepdim=True)


def test_a_registered_ranking_model_is_built_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ranking.RANKING_MODELS, "norm", f"{__name__}:TargetNorm")
    model = build_ranking(RankingSettings(name="norm"), DIMENSIONS, None)
    assert isinstance(model, TargetNorm)
