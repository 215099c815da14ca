"""The quality study: finished runs are read, and the table says what their scores say."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from benchmarks.quality.__main__ import quality
from benchmarks.quality.grid import Cell
from benchmarks.quality.runs import Plan
from benchmarks.quality.study import against_peers, effects, read_results, window_effects
from recsys.evaluation.metrics import ScoredRows
from tests.benchmarks.quality.quality_cells import (
    GAIN,
    NUM_USERS,
    scores,
    use_small_grid,
    write_runs,
    write_windows,
)
from tests.recsys.command_runs import TINY


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """Where the study has written its files, and its runs."""
    folder = tmp_path_factory.mktemp("study")
    data = write_windows(folder / "data")
    plan = write_runs(data, folder / "runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_grid(monkeypatch)
        quality(
            str(data),
            folder / "runs",
            seeds=2,
            grid="small",
            recipe=TINY,
            results=folder / "results" / "small",
        )
    return folder / "results", plan


def records(results: Path) -> dict[str, dict[str, Any]]:
    lines = (results / "small.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def test_a_metric_is_the_median_over_seeds_of_all_windows_together(
    study: tuple[Path, Plan],
) -> None:
    by_name = records(study[0])

    assert list(by_name) == ["ID only", "content"]
    for name, record in by_name.items():
        expected = []
        for seed in range(2):
            tables = [scores(window, seed, GAIN[name]) for window in range(2)]
            labels = np.concatenate([rows.labels[:, 0] for rows in tables])
            logits = np.concatenate([rows.logits[:, 0] for rows in tables])
            users = np.concatenate([rows.groups + NUM_USERS * n for n, rows in enumerate(tables)])
            expected.append(ScoredRows(labels, logits, users).metrics()["gauc"])
        assert record["by_seed"]["GAUC"] == pytest.approx({"0": expected[0], "1": expected[1]})
        assert record["median"]["GAUC"] == pytest.approx(median(expected))
        assert record["seeds"] == [0, 1]


def test_what_content_adds_counts_and_is_the_difference_of_the_means(
    study: tuple[Path, Plan],
) -> None:
    by_name = records(study[0])
    effect = by_name["content"]["effect"]["GAUC"]
    means = {
        name: np.mean(list(record["by_seed"]["GAUC"].values())) for name, record in by_name.items()
    }

    assert effect["value"] == pytest.approx(means["content"] - means["ID only"])
    assert 0 < effect["low"] < effect["value"] < effect["high"]
    assert effect["excludes_zero"]
    assert np.mean(effect["of_seeds"]) == pytest.approx(effect["value"])
    assert by_name["ID only"]["effect"] == {}


def test_the_recipe_is_compared_with_each_peer_that_has_runs(study: tuple[Path, Plan]) -> None:
    plan = study[1]
    cells = [Cell("ConcatFusion", "", {}), Cell("recipe", "", {}, "ID only")]
    runs = {"ConcatFusion": plan["ID only"], "recipe": plan["content"]}
    (effect,) = against_peers(read_results(cells, runs))

    assert (effect.cell.name, effect.cell.baseline) == ("recipe", "ConcatFusion")
    gain = records(study[0])["content"]["effect"]["GAUC"]
    interval = effect.intervals["GAUC"]
    assert interval is not None and interval.value == pytest.approx(gain["value"])
    assert against_peers(read_results(cells[:1], runs)) == []


def test_the_effects_of_each_window_stand_below_those_of_all(study: tuple[Path, Plan]) -> None:
    results, plan = study
    cells = [Cell("ID only", "", {}), Cell("content", "", {}, "ID only")]
    pooled = read_results(cells, plan)
    alone = {name: [[runs[1]] for runs in by_seed] for name, by_seed in plan.items()}

    first, second = window_effects(pooled)
    (expected,) = effects(read_results(cells, alone))

    assert [effect.intervals for effect in second] == [expected.intervals]
    assert first[0].intervals != second[0].intervals
    page = (results / "small.md").read_text()
    assert page.index("In window-1 alone:") < page.index("In window-2 alone:")
    assert window_effects([result.in_window(0) for result in pooled]) == []
