"""The ensemble head against one plain MLP per member, and what it gives in training and after."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ranking_settings
from recsys.model.build import build_ranking
from recsys.model.losses import RankingLoss
from recsys.ranking.din import DinDcnSettings
from recsys.ranking.layers.heads import EnsembleHead, EnsembleLinear, MemberLinear, ranking_head
from recsys.ranking.vectors import MemberLogits
from tests.recsys.ranking.ranking_inputs import CONTENT, DIMENSIONS, inputs

WIDTH, UNITS, LABELS, MEMBERS, ROWS = 5, [7, 4], 2, 3, 6
SETTINGS = DinDcnSettings(attention_units=[5], mlp_units=UNITS, ensemble_members=MEMBERS)


def head_of(dropout: float = 0.0) -> EnsembleHead:
    torch.manual_seed(0)
    head = EnsembleHead(WIDTH, UNITS, LABELS, MEMBERS, dropout)
    for parameter in head.parameters():  # off the start, where most scales are 1
        parameter.data += 0.3 * torch.randn_like(parameter)
    return head


def features() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def own_weights(layer: nn.Module, member: int) -> tuple[Tensor, Tensor]:
    """Weight [O, I] and bias [O] of the plain linear map that a member computes."""
    if isinstance(layer, MemberLinear):
        return layer.weight[member].T, layer.bias[member, 0]
    assert isinstance(layer, EnsembleLinear)
    scales = layer.scale_in[member].T * layer.scale_out[member]  # [I, O]
    return (layer.weight * scales).T, layer.bias[member, 0]


def plain_mlp(head: EnsembleHead, member: int, x: Tensor) -> Tensor:
    linear = [layer for layer in head.layers if isinstance(layer, EnsembleLinear | MemberLinear)]
    for layer in linear[:-1]:
        x = torch.relu(F.linear(x, *own_weights(layer, member)))
    return F.linear(x, *own_weights(linear[-1], member))


def test_each_member_is_a_plain_mlp_whose_weights_are_scaled_by_row_and_column() -> None:
    head, x = head_of(), features()
    members = head(x).members
    assert members.shape == (MEMBERS, ROWS, LABELS)
    for member in range(MEMBERS):
        torch.testing.assert_close(members[member], plain_mlp(head, member, x))


def test_gradients_of_the_members_losses_are_those_of_plain_mlps() -> None:
    head, twin, labels = head_of(), head_of(), torch.rand(ROWS, LABELS).round()
    loss = RankingLoss([1.0, 0.5])
    loss(head(features()).members, labels).backward()
    each = [loss(plain_mlp(twin, member, features()), labels) for member in range(MEMBERS)]
    torch.stack(each).mean().backward()
    for (name, own), expected in zip(head.named_parameters(), twin.parameters()):
        torch.testing.assert_close(own.grad, expected.grad, msg=name)


def test_padded_rows_weigh_nothing_in_any_member_s_loss() -> None:
    members, labels = torch.randn(MEMBERS, ROWS, 1), torch.ones(ROWS, 1)
    is_real = torch.tensor([1.0, 1, 0, 1, 0, 1])
    loss = RankingLoss([1.0])(members, labels, is_real)
    by_hand = F.softplus(-members[:, is_real.bool()]).sum() / (MEMBERS * ROWS)
    torch.testing.assert_close(loss, by_hand)


def test_in_evaluation_the_mean_logit_ranks() -> None:
    head, x = head_of(dropout=0.5), features()
    logits = head.eval()(x)
    each = [plain_mlp(head, member, x) for member in range(MEMBERS)]
    torch.testing.assert_close(logits, torch.stack(each).mean(0))
    torch.testing.assert_close(MemberLogits(torch.stack(each)).logits, logits)


def test_members_start_apart_by_signs_and_share_their_weight() -> None:
    torch.manual_seed(0)
    head = EnsembleHead(WIDTH, UNITS, 1, members=8, dropout=0.0)
    first, second = (layer for layer in head.layers if isinstance(layer, EnsembleLinear))
    assert set(first.scale_in.unique().tolist()) == {-1.0, 1.0}
    assert second.scale_in.unique().tolist() == [1.0]
    assert first.weight.shape == (WIDTH, UNITS[0])
    assert head(features()).members.std(dim=0).min() > 0.01


def test_dropout_of_a_member_is_its_own() -> None:
    torch.manual_seed(0)
    head = EnsembleHead(WIDTH, [50], 1, members=2, dropout=0.5)
    for parameter in head.parameters():
        parameter.data.fill_(1.0)  # members differ by what they drop alone
    members = head(features().abs()).members
    assert not torch.equal(members[0], members[1])


def test_without_hidden_layers_members_are_linear_maps() -> None:
    head = EnsembleHead(WIDTH, [], LABELS, MEMBERS, 0.0)
    members = head(features()).members
    torch.testing.assert_close(members[1], plain_mlp(head, 1, features()))


def test_one_member_is_the_mlp_itself() -> None:
    head = ranking_head(WIDTH, replace(SETTINGS, ensemble_members=1), 1)
    assert sum(isinstance(layer, nn.Linear) for layer in head) == len(UNITS) + 1
    assert not any(isinstance(layer, EnsembleHead) for layer in head)


@pytest.mark.parametrize("name", ["din_dcn", "din", "sim"])
@pytest.mark.parametrize("content", [CONTENT, None], ids=["content", "id_only"])
def test_ranking_models_have_ensembles(name: str, content: object) -> None:
    torch.manual_seed(0)
    settings = ranking_settings(name, mlp_units=UNITS, ensemble_members=MEMBERS, dropout=0.0)
    model = build_ranking(settings, DIMENSIONS, content)  # type: ignore[arg-type]
    ids, of_content, batch = inputs()
    scored = model(ids, of_content, batch)
    assert isinstance(scored, MemberLogits) and scored.members.shape == (MEMBERS, 3, 1)
    scored.members.sum().backward()
    torch.testing.assert_close(model.eval()(ids, of_content, batch), scored.logits)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.mlp.parameters())  # type: ignore[union-attr]
