"""The figures and tables of a run's page: of short runs, few users, several labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from recsys.diagnostics.run_report import item_popularity, learning_curves
from recsys.diagnostics.run_report.command import summary
from recsys.diagnostics.run_report.page import Drawing
from recsys.evaluation.metrics import RankedRows
from recsys.evaluation.scores import SplitScores


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by name, as they are drawn."""
    found: dict[str, Figure] = {}
    for module in (learning_curves, item_popularity):
        draw = module.drawn

        def keep(name: str, figure: Figure, caption: str, draw: Any = draw) -> Drawing:
            found[name] = figure
            return draw(name, figure, caption)

        monkeypatch.setattr(module, "drawn", keep)
    return found


def test_a_run_of_one_step_has_a_point_to_see_and_one_without_events_no_plot(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    empty = learning_curves.learning_curves(tmp_path, "auc")
    assert empty.drawings == [] and "tracker" in empty.words[0]

    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        writer.add_scalar("train/loss", 0.7, 1)
    learning_curves.learning_curves(tmp_path, "auc")
    (losses,) = figures["learning-curves"].axes
    assert [line.get_marker() for line in losses.lines] == ["o"]


def test_plots_of_metrics_end_at_one(tmp_path: Path, figures: dict[str, Figure]) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step, auc in ((1, 0.9), (2, 1.0)):
            writer.add_scalar("valid/auc", auc, step)
    learning_curves.learning_curves(tmp_path, "auc")
    item_popularity.item_popularity(rows_of_users(8), "test")

    assert len(figures) == 3
    for figure in figures.values():
        assert [axes.get_ylim()[1] for axes in figure.axes] == [1.0]


def rows_of_users(number: int) -> SplitScores:
    """Three positives and three negatives of each user, on items of 30 impressions."""
    rng = np.random.default_rng(0)
    users, labels = np.repeat(np.arange(number), 6), np.tile([0, 1, 0, 1, 0, 1], number)
    logits = labels + rng.normal(size=len(labels))
    rows, columns = np.arange(len(labels)), (labels[:, None], logits[:, None])
    return SplitScores(rows, users, rows, np.full(len(labels), 30), *columns, ("liked",))


def test_bars_of_few_users_have_the_interval_of_a_bootstrap_of_users() -> None:
    rows = rows_of_users(40)
    for metric in ("auc", "gauc"):
        interval = item_popularity.metric_interval(rows, metric)
        assert interval is not None
        low, high = interval
        whole = RankedRows(rows.labels[:, 0], rows.logits[:, 0], rows.groups).metrics()
        assert 0 < low < whole[metric] < high < 1
        assert 0.05 < high - low < 0.3
    assert item_popularity.metric_interval(rows_of_users(1), "gauc") is None


def test_bars_of_few_users_are_drawn_with_their_interval(figures: dict[str, Figure]) -> None:
    item_popularity.item_popularity(rows_of_users(40), "test")
    (axes,) = figures["quality-by-popularity"].axes
    drawn = [each for each in axes.containers if isinstance(each, ErrorbarContainer)]
    assert len(drawn) == 2  # of AUC and of GAUC
    for bars in drawn:
        (lines,) = bars.lines[2]
        ((low, high),) = [ends[:, 1] for ends in lines.get_segments() if len(ends)]  # of one bar
        assert 0.5 < low < high < 1


def test_rows_without_both_labels_have_no_empty_plot(figures: dict[str, Figure]) -> None:
    rows = rows_of_users(8)
    section = item_popularity.item_popularity(replace(rows, labels=np.ones((48, 1))), "test")
    assert section.drawings == [] and figures == {}
    assert any("one label" in text for text in section.words)


def test_every_label_has_a_table_and_a_softmax_loss_no_probabilities() -> None:
    values = dict.fromkeys(("auc", "gauc", "logloss", "ne", "calibration"), 0.5)
    part = values | {"num_samples": 3}
    report = part | dict.fromkeys(("warm", "cold", "unseen"), part)
    labels = {"labels": {"liked": report, "hated": report}}

    section = summary({"test": report | labels}, has_probabilities=True)
    assert [table.head[0] for table in section.tables] == ["liked", "hated"]
    assert "log loss" in section.tables[0].head

    section = summary({"test": report}, has_probabilities=False)
    (table,) = section.tables
    assert list(table.head) == ["items", "AUC", "GAUC", "rows"]
    assert table.rows[0] == ("all", "0.5000", "0.5000", "3")
    assert not any("og loss" in text or "robabilit" in text for text in section.words)
