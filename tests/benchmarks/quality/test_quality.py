"""The quality study: finished runs are read, and the page says what their scores say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from benchmarks.quality.__main__ import quality
from benchmarks.quality.cells import Cell
from benchmarks.quality.page import effect_sentence
from benchmarks.quality.plan import Plan
from benchmarks.quality.study import CellResult, Effect, against_peers, read_results
from recsys.evaluation.bootstrap import Interval
from recsys.evaluation.metrics import RankedRows
from recsys.evaluation.scores import SplitScores
from tests.benchmarks.quality.quality_cells import (
    CELLS,
    GAIN,
    NUM_ROWS,
    NUM_USERS,
    scores,
    use_small_grid,
    write_runs,
    write_windows,
)
from tests.html_pages import Page, browser_dom
from tests.recsys.command_runs import TINY

FIGURES = ["effects", "learning-curves", "popularity", "cold-start"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Plan]]:
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
    yield folder / "results", plan


def records(results: Path) -> dict[str, dict[str, Any]]:
    lines = (results / "small.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def test_a_metric_is_the_median_over_seeds_of_all_windows_together(
    study: tuple[Path, Plan],
) -> None:
    found = records(study[0])

    assert list(found) == ["ID only", "content"]
    for name, record in found.items():
        expected = []
        for seed in range(2):
            parts = [scores(window, seed, GAIN[name]) for window in range(2)]
            labels = np.concatenate([part.labels[:, 0] for part in parts])
            logits = np.concatenate([part.logits[:, 0] for part in parts])
            users = np.concatenate([part.groups + NUM_USERS * at for at, part in enumerate(parts)])
            expected.append(RankedRows(labels, logits, users).metrics()["gauc"])
        assert record["by_seed"]["GAUC"] == pytest.approx({"0": expected[0], "1": expected[1]})
        assert record["median"]["GAUC"] == pytest.approx(median(expected))
        assert record["seeds"] == [0, 1]


def test_what_content_adds_counts_and_is_the_difference_of_the_means(
    study: tuple[Path, Plan],
) -> None:
    found = records(study[0])
    effect = found["content"]["effect"]["GAUC"]
    means = {
        name: np.mean(list(record["by_seed"]["GAUC"].values())) for name, record in found.items()
    }

    assert effect["value"] == pytest.approx(means["content"] - means["ID only"])
    assert 0 < effect["low"] < effect["value"] < effect["high"]
    assert effect["excludes_zero"]
    assert np.mean(effect["of_seeds"]) == pytest.approx(effect["value"])
    assert found["ID only"]["effect"] == {}


def test_the_markdown_has_a_row_per_cell_and_per_effect(study: tuple[Path, Plan]) -> None:
    text = (study[0] / "small.md").read_text()
    content = records(study[0])["content"]
    medians = " | ".join(f"{value:.4f}" for value in content["median"].values())

    assert f"| content | 2 | {medians} |" in text
    assert f"| content – ID only | {content['effect']['GAUC']['value']:+.4f}\xa0[" in text
    assert f"window-1, window-2: {2 * NUM_ROWS:,} impressions" in text
    assert "AUC of validation" in text
    assert text.endswith("All figures: `small.html`.\n")


def test_a_table_without_a_page_says_the_same_and_names_none(
    study: tuple[Path, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = study[0]
    use_small_grid(monkeypatch)
    quality(
        str(written.parent / "data"),
        written.parent / "runs",
        seeds=2,
        grid="small",
        recipe=TINY,
        results=tmp_path / "small",
        page=False,
    )

    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.jsonl", "small.md"]
    tables = (tmp_path / "small.md").read_text().split("Test split of")[1]
    expected = (written / "small.md").read_text().split("Test split of")[1]
    assert expected == tables + "\nAll figures: `small.html`.\n"


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


def test_the_page_has_every_figure_and_fetches_nothing(study: tuple[Path, Plan]) -> None:
    page = Page((study[0] / "small.html").read_text())

    assert page.figures == FIGURES
    assert all(address.startswith("data:") for address in page.addresses)
    assert "Effect" in " ".join(page.titles)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")
def test_a_browser_shows_every_figure_within_1280_pixels(
    study: tuple[Path, Plan], tmp_path: Path
) -> None:
    script = (
        "<script>addEventListener('load', () => { document.body.dataset.shown = "
        "[...document.querySelectorAll('figure img')].map(image => "
        "`${image.complete && image.naturalWidth > 0 && image.width > 900}`).join(); "
        "document.body.dataset.fits = "
        "document.documentElement.scrollWidth <= innerWidth })</script>"
    )
    page = tmp_path / "page.html"
    text = (study[0] / "small.html").read_text()
    page.write_text(text.replace("</body>", script + "</body>"))
    shown = browser_dom(page)

    assert f'data-shown="{",".join(["true"] * len(FIGURES))}"' in shown
    assert 'data-fits="true"' in shown


def test_an_effect_is_said_with_its_interval_and_whether_it_counts() -> None:
    intervals = {
        "GAUC": Interval(0.0123, 0.004, 0.02),
        "GAUC cold": Interval(-0.001, -0.01, 0.008),
        "GAUC unseen": None,
    }

    of_seeds = {"GAUC": [0.01, 0.0146], "GAUC cold": [-0.001], "GAUC unseen": []}

    assert effect_sentence(Effect(CELLS[1], intervals, of_seeds)) == (
        "content against ID only: "
        "GAUC +0.0123, between +0.0040 and +0.0200, counts; "
        "single seeds from +0.0100 to +0.0146. "
        "GAUC cold -0.0010, between -0.0100 and +0.0080, does not count (its interval contains 0). "
        "GAUC unseen is not defined."
    )


def test_quality_by_popularity_takes_the_rows_of_each_range(study: tuple[Path, Plan]) -> None:
    counts = np.array([0, 0, 1, 4, 5, 11])
    labels = np.array([[1], [0], [1], [0], [0], [1]], np.float32)
    logits = np.array([[2], [1], [0], [1], [1], [0]], np.float32)
    places = np.arange(6)
    of_run = SplitScores(places, places * 0, places, counts, labels, logits, ("liked",))
    result = CellResult(Cell("cell", "", {}), [[]], [[of_run]])

    assert result.by_count("gauc", (0, 1, 5, 12)) == {
        "0": 1.0,
        "1–4": 0.0,
        "5–11": 0.0,
        "12+": None,
    }


def test_the_median_seed_is_told_by_validation(study: tuple[Path, Plan]) -> None:
    (_, plan) = study
    of_seeds = plan["content"]  # of AUC 0.7 and 0.8
    three = CellResult(CELLS[1], [of_seeds[1], of_seeds[0], of_seeds[1]], [])

    assert CellResult(CELLS[1], of_seeds, []).median_seed() == 0
    assert three.runs[three.median_seed()] == of_seeds[1]
