"""Neighbours: evidence beside a plain computation, votes by hand, folds left out, packages."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.config import NeighbourSettings, ranking_settings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch, TargetItems
from recsys.model.build import build_ranking
from recsys.ranking.layers.evidence import EVIDENCE, NUM_VOTES
from recsys.ranking.neighbours import DECAY, DECAY_AGE, FOLDS, NUM_BLENDED, PRIOR_VALUES, Neighbours
from recsys.serving.ranking_graph import (
    CandidateBatch,
    CandidateHistory,
    RankingGraph,
    SharedHistory,
)
from tests.recsys.ranking.ranking_inputs import CONTENT, DIMENSIONS, NUM_DENSE, inputs

NUM_ITEMS, DIM = 9, 4
WITH_ITEMS = replace(DIMENSIONS, num_items=NUM_ITEMS)
WEIGHTS = torch.tensor([(1 + 1 / DECAY_AGE) ** -DECAY, 1.0])  # of a history of two items


def neighbours_of(
    values: str | None = "liked", content: Any = None, dropout: float = 0.0
) -> Neighbours:
    """Neighbours with random statistics."""
    torch.manual_seed(0)
    settings = NeighbourSettings(values, dropout=dropout, dim=DIM, taste_dim=DIM)
    neighbours = Neighbours(settings, WITH_ITEMS, content).eval()
    for name in ("cooccurrence", "taste", "value_sums"):
        getattr(neighbours, name).normal_(0, 0.4)
    neighbours.value_counts.fill_(3)
    neighbours.value_mean.fill_(0.4)
    neighbours.value_deviation.fill_(0.5)
    return neighbours


def rows_of(items: list[int], targets: list[int], groups: list[int] | None = None) -> Batch:
    """Rows with histories of 2, 0 and 3 of five items."""
    _, _, batch = inputs()
    batch.history.items, batch.target.items = torch.tensor(items), torch.tensor(targets)
    batch.rows.groups = torch.tensor(groups or [0, 0, 0])
    return batch


BATCH = [1, 7, 2, 3, 4], [5, 0, 8]


def plain_evidence(neighbours: Neighbours, row: int, fold: int = FOLDS) -> Tensor:
    """The evidence of a row of `BATCH` in float64, by kernel regression over its items.

    An item's noise grows with its age.
    """
    first, last = ((0, 2), (2, 2), (2, 5))[row]
    items, target = torch.tensor(BATCH[0][first:last], dtype=torch.long), BATCH[1][row]
    _, content, batch = inputs()
    values = (batch.history.values[first:last, 0].double() - 0.4) / 0.5
    user_mean = values.sum() / (len(values) + PRIOR_VALUES)
    means = neighbours.value_sums[:, fold].double() / (3 + PRIOR_VALUES)
    shares = neighbours.log_shares.exp().double()
    factors = torch.cat([neighbours.cooccurrence, neighbours.taste.float()[:, :, :DIM]], dim=2)
    old, new = (factors[ids, fold].double() for ids in (items, target))
    prior = torch.cat([shares[0].expand(DIM), shares[2].expand(DIM)])
    if neighbours.content_map is not None:
        selections = slice(first, last), row
        modalities = content.read_history()[1], content.target_modalities
        maps = [
            neighbours.content_map(vectors.flatten(1)[selection]).double()
            for vectors, selection in zip(modalities, selections)
        ]
        old, new = torch.cat([old, maps[0]], 1), torch.cat([new, maps[1]])
        prior = torch.cat([prior, shares[1].expand(DIM)])
    residual = (shares.sum() - (old.square() * prior).sum(1)).clamp(min=0)
    growth = (1 + torch.arange(len(items)).flip(0) / DECAY_AGE) ** DECAY
    kernel = old * prior @ old.T + torch.diag((neighbours.log_noise.exp() + residual) * growth)
    similarity = old * prior @ new
    weights = torch.linalg.solve(kernel, similarity)
    square = (new.square() * prior).sum()
    variance = square - similarity @ weights + (shares.sum() - square).clamp(min=0)
    mean = weights @ (values - user_mean - means[items])
    one = torch.ones((), dtype=torch.float64)
    numbers = [mean, variance, means[target], (4 * one).log(), user_mean, (len(values) + one).log()]
    return torch.stack(numbers).float()


@pytest.mark.parametrize("content", [None, CONTENT])
def test_evidence_is_that_of_kernel_regression_over_the_history(content: Any) -> None:
    neighbours, batch = neighbours_of(content=content), rows_of(*BATCH)
    output = neighbours(inputs()[1], batch)
    for row in range(3):
        torch.testing.assert_close(output.evidence[row], plain_evidence(neighbours, row))
    features = output.batch.dense_features
    assert features.shape == (3, NUM_DENSE + NUM_VOTES)


def test_a_row_in_training_reads_statistics_without_its_own_fold_of_users() -> None:
    neighbours = neighbours_of(content=CONTENT).train()
    batch = rows_of(*BATCH, groups=[3, 4, 2 * FOLDS + 1])
    evidence = neighbours(inputs()[1], batch).evidence
    for row, fold in enumerate([3, 4, 1]):
        expected = plain_evidence(neighbours, row, fold)
        torch.testing.assert_close(evidence[row], expected, atol=1e-5, rtol=1e-5)


def test_a_row_in_training_reads_statistics_of_the_blocks_before_its_own() -> None:
    neighbours = neighbours_of(content=CONTENT).train()
    neighbours.block_starts[:] = torch.tensor([0, 10, 10, 30, 40])
    batch = rows_of(*BATCH, groups=[3, 4, 1])
    batch.rows.positions = torch.tensor([9, 10, 99])
    evidence = neighbours(inputs()[1], batch).evidence
    for row, block in enumerate([0, 2, 4]):
        expected = plain_evidence(neighbours, row, block)
        torch.testing.assert_close(evidence[row], expected, atol=1e-5, rtol=1e-5)


def test_votes_have_their_hand_values() -> None:
    neighbours = neighbours_of()
    neighbours.taste.zero_()
    for item, vector in {5: [1.0, 0, 0, 0], 1: [0.5, 0, 0, 0], 7: [-0.5, 0, 0, 0]}.items():
        neighbours.taste[item] = torch.tensor(vector)
    batch = rows_of(*BATCH)
    batch.history.values = torch.tensor([7.4, 0.4, 0, 0, 0]).unsqueeze(1)
    # The mean of 7 and 0 with 5 prior values is 1; in deviations of .5 both are 12 and -2.
    older = float(WEIGHTS[0])
    expected = [
        0.5 * 12 * older / (0.5 * older + 0.15),
        0.25 * 12 * older / (0.25 * older + 0.0125),
        0.0625 * 12 * older / (0.0625 * older + 0.0001),
        (0.5 * 12 * older + 0.5 * 2) / 3**0.5,
        math.log(1 + 0.5 * older),
    ]
    features = neighbours(None, batch).batch.dense_features
    votes = features[0, NUM_DENSE : NUM_DENSE + NUM_VOTES]
    torch.testing.assert_close(votes, torch.tensor(expected))
    assert not features[1, NUM_DENSE : NUM_DENSE + NUM_VOTES].any()  # no history


def test_each_modality_votes_by_the_cosines_of_its_content() -> None:
    neighbours, batch = neighbours_of(content=CONTENT), rows_of(*BATCH)
    content, calls = inputs()[1], list[Tensor]()
    neighbours.network.register_forward_pre_hook(lambda _, numbers: calls.extend(numbers))
    neighbours(content, batch)
    votes, (_, history) = calls[1], content.read_history()
    assert votes.shape == (3, 2 + history.shape[1], NUM_VOTES)
    values = (batch.history.values[:2, 0] - 0.4) / 0.5
    deviations = values - values.sum() / (2 + PRIOR_VALUES)
    for modality in range(history.shape[1]):
        target = content.target_modalities[0, modality]
        similarity = torch.cosine_similarity(history[:2, modality], target, dim=1)
        expected = similarity @ (deviations * WEIGHTS) / 3**0.5
        torch.testing.assert_close(votes[0, 2 + modality, 3], expected)


def test_blocks_of_rows_have_the_numbers_and_gradients_of_all_rows_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def numbers_and_gradients() -> list[Tensor]:
        neighbours, (_, content, _) = neighbours_of(content=CONTENT).train(), inputs()
        content.target_modalities.requires_grad_()
        output = neighbours(content, rows_of(*BATCH))
        (output.regression.square().sum() + output.logits.sin().sum()).backward()
        parameters = content.target_modalities, *neighbours.parameters()
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        assert len(gradients) > 5
        return [output.evidence, output.batch.dense_features, *gradients]

    monkeypatch.setattr("recsys.ranking.neighbours.is_on_host", lambda _: False)
    expected = numbers_and_gradients()
    monkeypatch.undo()
    for block_rows in (1, 2, 3):
        monkeypatch.setattr("recsys.ranking.neighbours.BLOCK_ROWS", block_rows)
        torch.testing.assert_close(numbers_and_gradients(), expected)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("on_host", [True, False])
def test_a_batch_without_any_history_has_the_evidence_of_its_rows_beside_others(
    is_training: bool, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.ranking.neighbours.is_on_host", lambda _: on_host)
    neighbours = neighbours_of(content=CONTENT).train(is_training)
    _, content, batch = inputs(torch.zeros(3, dtype=torch.long))
    batch.target.items = torch.tensor(BATCH[1])
    content.target_modalities[1] = inputs()[1].target_modalities[1]
    output, mixed = neighbours(content, batch), neighbours(inputs()[1], rows_of(*BATCH))
    torch.testing.assert_close(output.evidence[1], mixed.evidence[1])
    votes, expected = (result.batch.dense_features[1, NUM_DENSE:] for result in (output, mixed))
    torch.testing.assert_close(votes, expected)
    (output.regression.square().sum() + output.logits.sin().sum()).backward()
    assert neighbours.log_shares.grad is not None and neighbours.log_shares.grad.isfinite().all()


def test_lists_have_means_of_the_latest_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.ranking.neighbours.LATEST", (1, 2))
    neighbours, batch = neighbours_of(), rows_of(*BATCH)
    calls = list[Tensor]()
    neighbours.network.register_forward_pre_hook(lambda _, numbers: calls.extend(numbers))
    batch.history.values = torch.tensor([0.9, 0.4, -0.1, 1.4, 2.4]).unsqueeze(1)
    neighbours(None, batch)
    expected = torch.tensor([[0.4, 0.65], [0, 0], [2.4, 1.9]])
    torch.testing.assert_close(calls[2], expected)


def test_votes_of_training_in_half_precision_are_those_of_evaluation() -> None:
    neighbours, batch = neighbours_of(), rows_of(*BATCH)
    evaluated = neighbours(None, batch).batch.dense_features
    neighbours.taste[:, 0] = neighbours.taste[
        :, FOLDS
    ]  # the fold that a row of training leaves out
    trained = neighbours.train()(None, batch).batch.dense_features
    torch.testing.assert_close(trained, evaluated, atol=2e-3, rtol=2e-3)


def test_a_target_that_counts_as_new_in_training_is_known_by_content_alone() -> None:
    neighbours = neighbours_of(content=CONTENT, dropout=0.999).train()
    new = neighbours(inputs()[1], rows_of(*BATCH), torch.zeros(3))
    result = neighbours_of(content=CONTENT).train()(inputs()[1], rows_of(BATCH[0], [NUM_ITEMS] * 3))
    assert torch.equal(new.evidence, result.evidence)
    assert not new.evidence[:, EVIDENCE.index("item_count")].any()


def test_without_values_all_events_count_as_1_and_items_have_no_means() -> None:
    neighbours, batch = neighbours_of(values=None), rows_of(*BATCH)
    neighbours.value_sums.zero_()
    evidence = neighbours(None, batch).evidence
    old, new = neighbours.cooccurrence[[1, 7], FOLDS], neighbours.cooccurrence[5, FOLDS]
    residual = (neighbours.log_shares.exp().sum() - old.square().sum(1)).clamp(min=0)
    kernel = old @ old.T + torch.diag((neighbours.log_noise.exp() + residual) / WEIGHTS)
    torch.testing.assert_close(
        evidence[0, 0], old @ new @ torch.linalg.solve(kernel, torch.ones(2))
    )


def test_the_blend_returns_the_logits_of_the_network_until_it_is_fitted() -> None:
    neighbours = neighbours_of()
    output, network = neighbours(None, rows_of(*BATCH)), torch.randn(3, 1)
    assert torch.equal(neighbours.blend(network, output).logits, network)
    neighbours.blend.weight.normal_()
    columns = [network, output.logits, output.evidence[:, :NUM_BLENDED]]
    expected = torch.cat(columns, dim=1) @ neighbours.blend.weight.T
    torch.testing.assert_close(neighbours.blend(network, output).logits, expected)


@pytest.mark.parametrize("values", ["liked", None])
@pytest.mark.parametrize("name", ["din_dcn", "dlrm"])
def test_a_package_computes_the_same(name: str, values: str | None) -> None:
    neighbours = neighbours_of(values)
    neighbours.blend.weight.normal_()
    dimensions = replace(WITH_ITEMS, num_dense=NUM_DENSE + NUM_VOTES)
    model = build_ranking(ranking_settings(name), dimensions, None).eval()
    ids, _, batch = inputs(torch.tensor([3]))
    batch.history.items, batch.target.items = torch.tensor([1, 7, 2]), torch.tensor([4])
    output = neighbours(None, batch)
    expected = neighbours.blend(model(ids, None, output.batch), output).logits
    graph, none = RankingGraph(model, neighbours=neighbours), torch.zeros(1, 0)
    arguments = [ids.pooled, batch.dense_features, ids.target, ids.history, batch.history.values]
    arguments += [batch.target.items, batch.history.items, none, torch.zeros(3, 0), none]
    torch.testing.assert_close(graph(*arguments), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_candidates_of_one_user_have_the_evidence_and_votes_of_rows_with_equal_histories() -> None:
    neighbours = neighbours_of("liked", CONTENT)
    neighbours.content_map.weight.normal_()  # type: ignore[union-attr]
    _, content, batch = inputs(torch.tensor([3, 3]))
    history, values = torch.tensor([1, 7, 2]), batch.history.values[:3]
    modalities = content.read_history()[1][:3]
    targets = TargetItems(torch.tensor([4, 7]))
    rows = replace(
        batch.history, values=values.repeat(2, 1), items=history, index=torch.arange(3).repeat(2)
    )
    content = ContentVectors(
        content.target, modalities[:, 0], content.target_modalities, modalities
    )
    shared = CandidateHistory(values.repeat(2, 1), history, SharedHistory(2, 3, history.device), [])
    expected = neighbours(content, replace(batch, history=rows, target=targets))
    candidates = CandidateBatch(batch.dense_features, targets, shared)
    scored = neighbours(content, candidates)  # type: ignore[arg-type]
    for name in ("evidence", "regression", "logits"):
        torch.testing.assert_close(
            getattr(scored, name), getattr(expected, name), rtol=1e-6, atol=1e-6
        )
    votes, expected_votes = scored.batch.dense_features, expected.batch.dense_features
    torch.testing.assert_close(votes, expected_votes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_names": ("stars",)}, "neighbours.values is 'liked'.*stars"),
        ({"num_items": 0}, "bounded"),
        ({"has_history": False}, "kind sequence"),
    ],
)
def test_neighbours_need_a_list_and_items_with_rows_of_their_own(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Neighbours(NeighbourSettings("liked"), replace(WITH_ITEMS, **changes), None)
