"""Baselines of retrieval equal brute force over users and items."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as cross_entropy_of_torch

from recsys.cli import main
from recsys.config import RetrievalSettings
from recsys.evaluation.retrieval import row_gains
from recsys.serving.retrieval.baselines import (
    DECAYS,
    RIDGE,
    Blend,
    Catalogue,
    QueryRows,
    candidates,
    choose_blend,
    cross_entropy,
    interval,
    places,
)
from recsys.serving.retrieval.nearest_items import (
    SIGNIFICANCE,
    nearest,
    text_vectors,
    user_similarities,
)
from recsys.serving.retrieval.served_blend import ServedBlend

# Users of the items 0 to 4; the second has taken item 1 twice.
TAKEN = [[0, 1, 2], [1, 1, 2], [0, 3], [2], [1, 2, 3]]
TEXTS = ["a red house", "red ink", "ink and a pen", "", "the house of ink"]


def events() -> tuple[np.ndarray, np.ndarray]:
    users = [user for user, items in enumerate(TAKEN) for _ in items]
    return np.array(users) * 7, np.concatenate(TAKEN)


def similarity(first: int, second: int) -> float:
    """The shrunk cosine, by sets of users."""
    users = [{user for user, items in enumerate(TAKEN) if item in items} for item in range(5)]
    common = len(users[first] & users[second])
    if first == second or not common:
        return 0.0
    cosine = common / math.sqrt(len(users[first]) * len(users[second]))
    return cosine * common / (common + SIGNIFICANCE)


def rows(histories: list[list[int]], targets: list[int]) -> QueryRows:
    lengths = np.array([len(history) for history in histories])
    queries = np.random.default_rng(1).normal(size=(len(targets), 3)).astype(np.float32)
    counts = np.ones(len(targets), np.int64)
    return QueryRows(
        np.array(targets), np.concatenate(histories).astype(int), lengths, queries, counts
    )


def catalogue() -> Catalogue:
    random = np.random.default_rng(2)
    content, vectors = (random.normal(size=(5, 3)).astype(np.float32) for _ in range(2))
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    popularity = np.log1p(np.bincount(events()[1], minlength=5)).astype(np.float32)
    texts = text_vectors(TEXTS)
    similar = user_similarities(*events(), 5)
    return Catalogue(popularity, similar, content, vectors, texts, nearest(texts, 2), repeats=True)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_scores_are_weighted_means_over_the_history(decay: float) -> None:
    histories, items = [[0, 3], [], [2, -1, 1]], catalogue()  # -1: an item that is not there
    scores = items.scores(rows(histories, [1, 1, 4]), decay, items.baselines)
    assert items.content is not None and items.texts is not None
    cosines_of_texts = (items.texts @ items.texts.T).toarray()
    for row, history in enumerate(histories):
        ages = range(len(history) - 1, -1, -1)
        weights = {item: decay**age for item, age in zip(history, ages) if item >= 0}
        total = sum(weights.values()) or 1.0
        for candidate in range(5):
            by_users = sum(w * similarity(item, candidate) for item, w in weights.items())
            cosines = (
                w * items.content[item] @ items.content[candidate] for item, w in weights.items()
            )
            assert scores["item_cf"][row, candidate] == pytest.approx(by_users / total, abs=1e-6)
            assert scores["content"][row, candidate] == pytest.approx(
                sum(cosines) / total, abs=1e-6
            )
            assert scores["popularity"][row, candidate] == items.popularity[candidate]
            by_texts = sum(w * cosines_of_texts[item, candidate] for item, w in weights.items())
            assert scores["text"][row, candidate] == pytest.approx(by_texts / total, abs=1e-6)
            again = weights.get(candidate, 0) / total
            assert scores["repeat"][row, candidate] == pytest.approx(again, abs=1e-6)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_places_count_higher_and_equal_scores_of_other_items(exclude_seen: bool) -> None:
    scores = np.array([[3.0, 1, 1, 2, 1], [0, 0, 0, 0, 5]], np.float32)
    above, tied = places(scores, rows([[0, 4, -1], [4]], [1, 4]), exclude_seen)
    assert (above.tolist(), tied.tolist()) == (
        ([1, 0], [1, 0]) if exclude_seen else ([2, 0], [2, 0])
    )


def test_rows_count_by_their_weights() -> None:
    differences, weights = torch.tensor([1.0, 0, 5]).double(), torch.tensor([3.0, 1, 0])
    error = math.sqrt((0.75 * 0.25) ** 2 + (0.25 * 0.75) ** 2)
    expected = [0.75, 0.75 - 1.96 * error, 0.75 + 1.96 * error]
    assert interval(differences, weights) == pytest.approx(expected)
    assert interval(differences, None)[0] == pytest.approx(2)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_loss_of_weights_and_its_gradient_are_those_of_a_softmax(exclude_seen: bool) -> None:
    items, valid = catalogue(), rows([[0], [1, 4], [2], [3], [0, 1]], [1, 2, 1, 0, 2])
    valid = replace(valid, weights=torch.tensor([1.0, 2, 1, 0.5, 1]))
    parts = items.scores(valid, 0.8, ("popularity", "item_cf", "content"))
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    deviations = np.array([1.0, 0.1, 0.5])
    is_candidate = candidates(valid, 5, exclude_seen)

    loss, gradient = cross_entropy(weights.detach().numpy(), parts, deviations, valid, is_candidate)

    logits = sum(
        weight * torch.from_numpy(np.array(part)).double() / deviation
        for weight, part, deviation in zip(weights, parts.values(), deviations, strict=True)
    )
    assert isinstance(logits, torch.Tensor) and valid.weights is not None
    logits = logits.masked_fill(~torch.from_numpy(is_candidate), -torch.inf)
    row_losses = cross_entropy_of_torch(logits, torch.from_numpy(valid.targets), reduction="none")
    expected = row_losses @ valid.weights.double() / valid.weights.sum()
    expected = expected + RIDGE * weights.square().sum() / 2
    assert loss == pytest.approx(expected.item())
    expected.backward()
    assert weights.grad is not None
    assert gradient.tolist() == pytest.approx(weights.grad.tolist())
    # An item of the history is no candidate on request, unless it is asked for.
    assert is_candidate[1].tolist() == [True, not exclude_seen, True, True, not exclude_seen]


def test_a_blend_is_as_likely_as_others_of_its_decay_and_has_no_negative_weight() -> None:
    items, settings = catalogue(), RetrievalSettings()
    valid = rows([[0], [1], [2], [3], [0, 1]], [1, 2, 1, 0, 2])
    names = ("popularity", "item_cf", "content")

    def loss(blend: Blend) -> float:
        parts = items.scores(valid, blend.decay, names)
        deviations = np.array([part.std() for part in parts.values()])
        weights = np.array([blend.weights[name] for name in names]) * deviations
        every = np.ones((5, 5), bool)
        return cross_entropy(weights, parts, deviations, valid, every)[0]

    best = choose_blend(items, valid, names, settings)

    assert min(best.weights.values()) >= 0 and max(best.weights.values()) > 0
    for name in names:
        for factor in (0.0, 0.9, 1.1):
            weight = best.weights[name] * factor + 1e-3 * (factor > 1)
            assert loss(best) <= loss(Blend(best.decay, {**best.weights, name: weight})) + 1e-6


def test_the_decay_of_a_blend_is_that_of_the_highest_ndcg() -> None:
    items, settings = catalogue(), RetrievalSettings(depths=[3])
    random = np.random.default_rng(3)
    valid = rows(random.integers(0, 5, (40, 3)).tolist(), random.integers(0, 5, 40).tolist())

    def ndcg(decay: float) -> float:
        scores = items.scores(valid, decay, ("item_cf",))["item_cf"]
        above, tied = map(torch.from_numpy, places(scores, valid, settings.exclude_seen))
        return float(row_gains("ndcg", above, tied, 3).mean())

    blend = choose_blend(items, valid, ("item_cf",), settings)

    assert blend.weights == {"item_cf": 1.0}
    assert ndcg(blend.decay) == max(map(ndcg, DECAYS)) > min(map(ndcg, DECAYS))


def test_weights_without_rows_of_validation_are_refused() -> None:
    with pytest.raises(ValueError, match="validation chooses the weights; give it such rows"):
        choose_blend(catalogue(), rows([[0]], [1]).block(1, 1), ("item_cf",), RetrievalSettings())


def test_a_served_blend_finds_what_all_scores_rank_first() -> None:
    items = catalogue()
    query_rows = rows([[0, 3], [], [2, -1, 1]], [1, 1, 4])
    weights = dict(zip(items.served_parts, (0.3, 5.0, 0.7, 2.0, 0.2, 0.4)))
    expected = Blend(0.5, weights).scores(items.scores(query_rows, 0.5, items.served_parts))
    served_blend, vectors = ServedBlend.of(items, Blend(0.5, weights))
    for row, block in enumerate(query_rows.blocks(1)):
        query = served_blend.query(block.queries[0], block.histories, vectors)
        for count in (1, 3, 5):
            by_vectors = np.argsort(-(vectors @ query))[:count]  # what an exact index returns
            scores, best = served_blend.search(query, block.histories, by_vectors, vectors)
            order = np.argsort(-expected[row])[:count]
            assert best[:count].tolist() == order.tolist()
            np.testing.assert_allclose(scores[:count], expected[row, order], rtol=1e-5)


def test_the_command_compares_a_run_with_baselines(
    towers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = towers / "run"
    assert main(["baselines", "--run", str(run)]) == 0
    reports: dict[str, Any] = json.loads((run / "baselines_test.json").read_text())
    assert list(reports) == [
        "popularity",
        "item_cf",
        "content",
        "encoders",
        "text",
        "repeat",
        "model",
        "blend",
        "blend with model",
    ]
    measured = json.loads((run / "metrics.json").read_text())["test"]["retrieval"]
    for name in ("recall@10", "ndcg@50"):
        assert reports["model"]["all"][name] == pytest.approx(measured[name], abs=1e-6)
    mean, low, high = reports["model"]["gain over blend"]
    difference = reports["model"]["all"]["ndcg@10"] - reports["blend"]["all"]["ndcg@10"]
    assert mean == pytest.approx(difference) and low <= mean <= high
    table = capsys.readouterr().out.splitlines()
    assert table[-3].startswith("blend with model") and any(
        "recall@10 unseen" in line for line in table
    )


def test_a_ranking_model_is_refused(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baselines", "--run", str(trained.run)]) == 1
    assert "give a run of two_tower" in capsys.readouterr().err
