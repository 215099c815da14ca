"""Baselines of retrieval equal brute force over users and items."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.sparse import csr_matrix, identity

from recsys.checkpoint.partitions import ContinualFolder, RunState, TrainedPartition
from recsys.cli import main
from recsys.config import Config, RetrievalSettings
from recsys.data.schema import load_schema
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.bootstrap import effective_users, interval_stretch
from recsys.evaluation.predict import load_run
from recsys.evaluation.retrieval import row_gains
from recsys.serving.retrieval import baselines
from recsys.serving.retrieval.baselines import (
    DECAYS,
    FACTORS,
    Blend,
    Catalogue,
    _read_events,
    best_weights,
    blend_to_serve,
    choose_blend,
    format_interval,
    interval,
    settings_with_vectors,
)
from recsys.serving.retrieval.item_vectors import raw_ids
from recsys.serving.retrieval.nearest_items import (
    MAX_STEPS,
    SIGNIFICANCE,
    nearest,
    text_vectors,
    user_similarities,
)
from recsys.serving.retrieval.query_rows import QueryRows, other_candidates, rank_among, rank_rows
from recsys.serving.retrieval.served_blend import ServedBlend
from recsys.storage.location import Location
from tests.recsys.weighted_data import table_of, write_weighted

# Users of the items 0 to 4; the second has taken item 1 twice.
TAKEN_ITEMS = [[0, 1, 2], [1, 1, 2], [0, 3], [2], [1, 2, 3]]
TRANSITIONS = np.array(  # how much an item is followed by another
    [[0, 3, 1, 1, 0], [0, 0, 2, 1, 0], [1, 0, 0, 2, 0], [0, 0, 0, 0, 5], [1, 0, 0, 0, 0]],
    np.float32,
)
TEXTS = ["a red house", "red ink", "ink and a pen", "", "the house of ink"]


def events() -> tuple[np.ndarray, np.ndarray]:
    users = [user for user, items in enumerate(TAKEN_ITEMS) for _ in items]
    return np.array(users) * 7, np.concatenate(TAKEN_ITEMS)


def similarity(first: int, second: int) -> float:
    """The shrunk cosine, by sets of users."""
    users = [{user for user, items in enumerate(TAKEN_ITEMS) if item in items} for item in range(5)]
    common = len(users[first] & users[second])
    if first == second or not common:
        return 0.0
    cosine = common / math.sqrt(len(users[first]) * len(users[second]))
    return cosine * common / (common + SIGNIFICANCE)


def rows(histories: list[list[int]], targets: list[int]) -> QueryRows:
    lengths = np.array([len(history) for history in histories])
    queries = np.random.default_rng(1).normal(size=(len(targets), 3)).astype(np.float32)
    counts = np.ones(len(targets), np.int64)
    users = np.arange(len(targets))
    items = np.concatenate(histories).astype(int)
    return QueryRows(np.array(targets), items, lengths, queries, counts, users)


def catalogue() -> Catalogue:
    random = np.random.default_rng(2)
    content, vectors = (random.normal(size=(5, 3)).astype(np.float32) for _ in range(2))
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    popularity = np.log1p(np.bincount(events()[1], minlength=5)).astype(np.float32)
    texts = text_vectors(TEXTS)
    similar = user_similarities(*events(), 5)
    near_texts = nearest(texts, 2)
    neighbours = {
        "item_cf": similar,
        "transitions": csr_matrix(TRANSITIONS),
        "near_text": near_texts,
        "repeat": identity(5, np.float32, "csr"),
    }
    components = {"model": vectors, "content": content, "text": texts}
    return Catalogue(popularity, neighbours, components)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_scores_are_weighted_means_over_the_history(decay: float) -> None:
    histories, items = [[0, 3], [], [2, -1, 1]], catalogue()  # -1: an item that is not there
    scores = items.scores(rows(histories, [1, 1, 4]), decay, items.baselines)
    content, texts = items.vectors["content"], items.vectors["text"]
    cosines_of_texts = (texts @ texts.T).toarray()
    for row, history in enumerate(histories):
        ages = range(len(history) - 1, -1, -1)
        weights = {item: decay**age for item, age in zip(history, ages) if item >= 0}
        total = sum(weights.values()) or 1.0
        for candidate in range(5):
            by_users = sum(w * similarity(item, candidate) for item, w in weights.items())
            cosines = (w * content[item] @ content[candidate] for item, w in weights.items())
            assert scores["item_cf"][row, candidate] == pytest.approx(by_users / total, abs=1e-6)
            by_order = sum(w * TRANSITIONS[item, candidate] for item, w in weights.items())
            assert scores["transitions"][row, candidate] == pytest.approx(by_order / total)
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
    above, tied = rank_rows(scores, rows([[0, 4, -1], [4]], [1, 4]), exclude_seen)
    assert (above.tolist(), tied.tolist()) == (
        ([1, 0], [1, 0]) if exclude_seen else ([2, 0], [2, 0])
    )


def test_rows_count_by_their_weights() -> None:
    differences = torch.tensor([1.0, 0, 0, 0, 5, 9]).double()
    weights, users = torch.tensor([3.0, 1, 1, 1, 0, 2]), np.array([8, 2, 5, 1, 3, 7])
    mean = (3 + 2 * 9) / 8
    residuals = [3 * (1 - mean), -mean, -mean, -mean, 0, 2 * (9 - mean)]
    error = math.sqrt(sum(residual**2 for residual in residuals)) / 8
    margin = 1.96 * error * interval_stretch(effective_users(weights.numpy()))
    expected = [mean, mean - margin, mean + margin]
    assert interval(differences, users, weights) == pytest.approx(expected)
    assert interval(differences, users)[0] == pytest.approx(15 / 6)


def test_rows_of_four_users_have_no_interval() -> None:
    differences, users = torch.ones(40).double(), np.arange(40) % 4
    assert interval(differences, users) == [pytest.approx(1), None, None]
    five_users, weights = np.arange(40) % 5, torch.from_numpy(np.arange(40) % 5 > 0)
    assert interval(differences, five_users, weights) == [pytest.approx(1), None, None]
    assert format_interval([0.5, None, None]) == "+0.5000 without an interval: too few users"
    assert format_interval([0.5, 0.25, 0.75]) == "+0.5000 [+0.2500, +0.7500] over users"


def test_more_rows_that_say_the_same_of_a_user_do_not_narrow_an_interval() -> None:
    differences, users = torch.randn(20, generator=torch.manual_seed(0)).double(), np.arange(20)
    expected = interval(differences, users)
    assert interval(differences.repeat(9), np.tile(users, 9)) == pytest.approx(expected)


def test_an_interval_of_one_row_per_user_is_that_of_a_mean() -> None:
    from scipy import stats

    differences = torch.randn(30, generator=torch.manual_seed(0)).double()
    expected = stats.t.interval(0.95, 29, differences.mean(), stats.sem(differences.numpy()))
    assert interval(differences, np.arange(30))[1:] == pytest.approx(list(expected), rel=1e-4)


def test_an_item_of_the_history_competes_unless_it_is_excluded() -> None:
    valid = rows([[0], [1, 4], [2, -1]], [1, 2, 2])
    assert (~other_candidates(valid, 5, False)).nonzero()[1].tolist() == [1, 2, 2]
    assert other_candidates(valid, 5, True).tolist() == [
        [False, False, True, True, True],
        [True, False, False, True, False],
        [True, True, False, True, True],
    ]


def validation_rows(seed: int) -> QueryRows:
    random = np.random.default_rng(seed)
    return rows(random.integers(0, 5, (40, 3)).tolist(), random.integers(0, 5, 40).tolist())


def gain_of_all_ranks(scores: np.ndarray, valid: QueryRows, settings: RetrievalSettings) -> float:
    above, tied = map(torch.from_numpy, rank_rows(scores, valid, settings.exclude_seen))
    return float(row_gains("ndcg", above, tied, 5).mean())


@pytest.mark.parametrize("seed", range(3))
def test_no_part_and_no_other_weight_that_is_tried_ranks_validation_better(seed: int) -> None:
    items, valid, settings = catalogue(), validation_rows(seed), RetrievalSettings()
    names = ("popularity", "item_cf", "content")

    best = choose_blend(items, valid, names, settings)

    components = items.scores(valid, best.decay, names)
    highest = gain_of_all_ranks(best.scores(components), valid, settings)
    assert min(best.weights.values()) >= 0 and max(best.weights.values()) > 0
    for component in components.values():
        assert gain_of_all_ranks(np.array(component), valid, settings) <= highest
    for name, weight in best.weights.items():
        for factor in FACTORS:
            other = Blend(best.decay, {**best.weights, name: weight * factor})
            if any(other.weights.values()):
                gain = gain_of_all_ranks(other.scores(components), valid, settings)
                assert gain <= highest + 1e-9


def test_a_part_that_orders_what_another_leaves_tied_joins_it() -> None:
    first = np.array([[1, 1, 0], [1, 1, 0]], np.float32)
    second = np.array([[0, 1, 9], [1, 0, 9]], np.float32)

    def share_of_targets(scores: np.ndarray) -> float:
        return float((scores.argmax(axis=1) == [1, 0]).mean())

    weights, highest = best_weights({"first": first, "second": second}, share_of_targets)

    assert highest == 1 and weights["first"] == 1 and 0 < weights["second"] < 1 / 8


def test_an_ascent_from_all_parts_finds_what_one_from_the_best_part_misses() -> None:
    components = {
        "first": np.array([[3, 4, 4], [4, 0, 0], [3, 0, 0]], np.float32),
        "second": np.array([[3, 0, 3], [0, 3, 3], [0, 2, 0]], np.float32),
        "third": np.array([[4, 2, 0], [4, 3, 1], [1, 0, 2]], np.float32),
    }

    def share_of_rows(scores: np.ndarray) -> float:
        above, tied = rank_among(scores, np.arange(3), np.ones((3, 3), bool))
        return float((above + tied == 1).mean())  # the target is equal to itself

    alone = {"first": 0.0, "second": 0.0, "third": 1.0}
    assert baselines._ascend(components, share_of_rows, alone)[1] == pytest.approx(2 / 3)

    weights, highest = best_weights(components, share_of_rows)

    assert highest == share_of_rows(Blend(1.0, weights).scores(components)) == 1


@pytest.mark.parametrize("names", [["item_cf", "content"], []])
def test_a_part_that_is_constant_in_validation_has_no_weight(names: list[str]) -> None:
    valid = validation_rows(0)
    components = catalogue().scores(valid, 0.5, names)
    components["near_text"] = np.full((40, 5), 0.3, np.float32)

    def ndcg(scores: np.ndarray) -> float:
        return gain_of_all_ranks(scores, valid, RetrievalSettings())

    weights, _ = best_weights(components, ndcg)

    assert weights["near_text"] == (0 if names else 1)  # alone, it is the best part


def test_the_decay_of_a_blend_is_that_of_the_highest_ndcg() -> None:
    items, settings = catalogue(), RetrievalSettings(depths=[3])
    valid = validation_rows(3)

    def ndcg(decay: float) -> float:
        scores = items.scores(valid, decay, ("item_cf",))["item_cf"]
        return gain_of_all_ranks(scores, valid, settings)

    blend = choose_blend(items, valid, ("item_cf",), settings)

    assert blend.weights == {"item_cf": 1.0}
    assert ndcg(blend.decay) == max(map(ndcg, DECAYS)) > min(map(ndcg, DECAYS))


def test_rows_without_weight_choose_nothing() -> None:
    items, settings, valid = catalogue(), RetrievalSettings(), validation_rows(5)
    weighted = replace(valid, weights=torch.cat([torch.ones(20), torch.zeros(20)]))

    blend = choose_blend(items, weighted, ("item_cf",), settings)

    assert blend == choose_blend(items, valid.take(np.arange(20)), ("item_cf",), settings)
    assert blend != choose_blend(items, valid, ("item_cf",), settings)


@pytest.mark.parametrize("weights", [None, torch.zeros(1)])
def test_weights_without_rows_of_validation_are_refused(weights: torch.Tensor | None) -> None:
    valid = replace(rows([[0]], [1]), weights=weights)
    valid = valid.take(np.arange(0)) if weights is None else valid
    with pytest.raises(ValueError, match="validation chooses the weights; give it such rows"):
        choose_blend(catalogue(), valid, ("item_cf",), RetrievalSettings())


def test_rows_that_choose_weights_are_drawn_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    items, settings, valid = catalogue(), RetrievalSettings(), validation_rows(7)
    monkeypatch.setattr(baselines, "MAX_SCORES", 14 * 5)
    blend = choose_blend(items, valid, items.baselines, settings)
    every_third = valid.take(np.arange(0, 40, 3))
    assert every_third.targets.tolist() == valid.targets[::3].tolist()
    assert every_third.histories.tolist() == [
        item for row in range(0, 40, 3) for item in valid.histories[3 * row : 3 * row + 3]
    ]

    assert blend == choose_blend(items, every_third, items.baselines, settings)
    assert blend != choose_blend(items, valid.take(np.arange(14)), items.baselines, settings)


def test_a_served_blend_finds_what_all_scores_rank_first() -> None:
    items = catalogue()
    query_rows = rows([[0, 3], [], [2, -1, 1]], [1, 1, 4])
    weights = dict(zip(items.served_terms, (0.3, 5.0, 0.1, 0.7, 2.0, 0.2, 0.4), strict=True))
    expected = Blend(0.5, weights).scores(items.scores(query_rows, 0.5, items.served_terms))
    served_blend, vectors = ServedBlend.make(items, Blend(0.5, weights))
    for row, block in enumerate(query_rows.blocks(1)):
        query = served_blend.query(block.queries[0], block.histories, vectors)
        for count in (1, 3, 5):
            by_vectors = np.argsort(-(vectors @ query))[:count]  # what an exact index returns
            scores, best = served_blend.search(query, block.histories, by_vectors, vectors)
            order = np.argsort(-expected[row])[:count]
            assert best[:count].tolist() == order.tolist()
            np.testing.assert_allclose(scores[:count], expected[row, order], rtol=1e-5)


def test_weights_of_an_item_before_many_unknown_ones_add_up_to_1() -> None:
    history = [3] + [-1] * 90
    served_blend, _ = ServedBlend.make(catalogue(), Blend(0.3, {"item_cf": 1.0}))
    assert rows([history], [1]).history_weights(5, 0.3).toarray().tolist() == [[0, 0, 0, 1, 0]]
    assert served_blend.age_weights(np.array(history)).tolist() == [1] + [0] * 90


def test_transitions_are_those_of_loops_over_the_training_rows(towers: Path) -> None:
    with joined_ranks("cpu") as ranks:
        job = load_run(towers / "run", None, ranks, "cpu")
        items, _ = blend_to_serve(towers / "run", job)
        index_of = {item: number for number, item in enumerate(raw_ids(job).to_pylist())}
    pairs, counts = np.zeros((len(index_of), len(index_of))), np.zeros(len(index_of))
    for row in pq.read_table(towers / "data" / "train").to_pylist():
        if row["liked"] is None or row["liked"] <= 0 or row["item"] not in index_of:
            continue
        counts[index_of[row["item"]]] += 1
        for step, earlier in enumerate(reversed(row["history"] or [])):
            if step < MAX_STEPS and earlier in index_of and earlier != row["item"]:
                pairs[index_of[earlier], index_of[row["item"]]] += 0.8**step
    shrunk = pairs**2 / (pairs + 3) / np.sqrt(np.outer(counts.clip(1), counts.clip(1)))

    assert (shrunk > 0).sum() > 20 and (shrunk != shrunk.T).any()
    np.testing.assert_allclose(
        items.neighbours["transitions"].toarray(), shrunk, rtol=1e-5, atol=1e-9
    )


def test_rows_of_weight_0_are_no_events_of_baselines(tmp_path: Path) -> None:
    data, _ = write_weighted(tmp_path)
    root = Location.of(str(data))
    dataset = {"schema": load_schema(root), "root": root, "train_folder": "train"}
    job: Any = SimpleNamespace(**dataset, config=Config())
    users, items, _ = _read_events(Path("run"), job, np.arange(40))
    expected = [
        (row["user"], row["item"])
        for row in table_of(data, "train").to_pylist()
        if row["times"] > 0 and row["liked"] > 0
    ]
    assert list(zip(users.tolist(), items.tolist(), strict=True)) == expected


def test_events_are_of_all_partitions_that_a_run_has_learned_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, _ = write_weighted(tmp_path)
    rows, names = table_of(data, "train"), ["date=1", "date=2", "date=3"]
    shutil.rmtree(data / "train")
    for index, name in enumerate(names):  # the run of the second was made before the third
        (data / "train" / name).mkdir(parents=True)
        pq.write_table(rows.slice(20 * index, 20), data / "train" / name / "part.parquet")
    trained = tuple(TrainedPartition(name, 20, "") for name in names)
    ContinualFolder(tmp_path).write(RunState(trained))
    root = Location.of(str(data))
    dataset = {"schema": load_schema(root), "root": root, "train_folder": "train/date=2"}
    job: Any = SimpleNamespace(**dataset, config=Config())
    _, items, _ = _read_events(tmp_path / "partitions" / "date=2", job, np.arange(40))
    counted = [row for row in rows.slice(0, 40).to_pylist() if row["times"] > 0 < row["liked"]]
    assert items.tolist() == [row["item"] for row in counted] and not caplog.messages

    shutil.rmtree(data / "train" / "date=1")
    _, items, _ = _read_events(tmp_path / "partitions" / "date=2", job, np.arange(40))
    assert items.tolist() == [row["item"] for row in counted][-len(items) :]
    assert "1 of 2 partitions that the run has learned from are gone" in caplog.messages[0]


def test_several_ranks_are_refused() -> None:
    ranks = Ranks(0, 2, 0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="start them without torchrun"):
        baselines.compare_with_baselines(Path("run"), None, ranks)


def test_the_command_compares_a_run_with_baselines(
    towers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = towers / "run"
    assert main(["baselines", "--run", str(run)]) == 0
    reports: dict[str, Any] = json.loads((run / "baselines_test.json").read_text())
    assert list(reports) == [
        "popularity",
        "item_cf",
        "transitions",
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
    mean, lower, upper = reports["model"]["gain over blend"]
    difference = reports["model"]["all"]["ndcg@10"] - reports["blend"]["all"]["ndcg@10"]
    assert mean == pytest.approx(difference) and lower <= mean <= upper
    table = capsys.readouterr().out.splitlines()
    assert table[-3].startswith("blend with model") and any(
        "recall@10 unseen" in line for line in table
    )


def test_a_test_split_that_asks_for_no_item_is_refused(
    towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(towers / "data", tmp_path / "data")
    for file in (data / "test").glob("*.parquet"):
        table = pq.read_table(file).drop_columns("liked")
        pq.write_table(table.append_column("liked", [np.zeros(len(table), np.float32)]), file)
    assert main(["baselines", "--run", str(towers / "run"), "--data", str(data)]) == 1
    assert "data/test: no row with a weight has a positive first label" in capsys.readouterr().err


def test_a_ranking_model_is_refused(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baselines", "--run", str(trained.run)]) == 1
    assert "give a run of two_tower" in capsys.readouterr().err


def test_items_of_a_bounded_vocabulary_whose_histories_are_rows_are_refused() -> None:
    schema = SimpleNamespace(has_bounded_items=True, target_item="item")
    job: Any = SimpleNamespace(schema=schema, config=Config())
    with pytest.raises(ValueError, match="run: 'item' has a vocabulary of kind bounded"):
        settings_with_vectors(Path("run"), job)
