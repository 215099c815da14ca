"""Draw metrics by step, by partition of a continual run, and by items' training impressions.

A continual run scores a partition before it trains on it. ID vectors of items with few training
impressions are hardly trained. Shapes: N rows of the split.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recsys.checkpoint.partitions import ContinualFolder
from recsys.config import BestModelBy
from recsys.data.item_frequency import SUBSETS
from recsys.diagnostics.run_report.page import (
    BLUE,
    GREY,
    ORANGE,
    Drawing,
    Section,
    Table,
    drawn,
    metrics_table,
    new_figure,
)
from recsys.evaluation.metrics import ScoredRows
from recsys.evaluation.model_selection import (
    METRICS,
    selection_score,
    selection_text,
    tracked_name,
)
from recsys.evaluation.scores import SplitScores
from recsys.storage.files import regular_file

Curve = tuple[list[int], list[float]]  # steps and values
LOSS_COLOURS = {"ranking": BLUE, "contrastive": ORANGE, "loss": GREY}
METRIC_COLOURS = {"auc": BLUE, "gauc": ORANGE, "rmse": BLUE, "mae": ORANGE}
MARKED_POINTS = 30
FEWEST_OF_A_LINE = 3  # a line through two points always shows a trend
QUESTIONS = {
    "train/": "Does the training loss still fall?",
    "valid/": "Does the model still improve in validation?",
}
ROUNDING = 1e-6  # rounding error of TensorBoard's events, which are float32


def read_curves(run: Path) -> dict[str, Curve]:
    """Return the curve of every scalar of the run, by tag; empty without TensorBoard files."""
    if not (run / "tensorboard").is_dir():
        return {}
    for file in (run / "tensorboard").glob("*tfevents*"):
        regular_file(file)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        values = events.Scalars(tag)
        curves[tag] = [value.step for value in values], [value.value for value in values]
    return curves


def selection_curve(curves: dict[str, Curve], best_model_by: BestModelBy) -> Curve:
    """Return the curve of the score that chose the best model (negative errors); may be empty."""
    metrics_by_step: dict[int, dict[str, float]] = {}
    for name in METRICS[best_model_by]:
        for step, value in zip(*curves.get(f"valid/{tracked_name(name)}", ([], []))):
            metrics_by_step.setdefault(step, {})[name] = value
    steps, scores = list[int](), list[float]()
    for step, metrics in sorted(metrics_by_step.items()):
        if (score := selection_score(metrics, best_model_by)) is not None:
            steps.append(step)
            scores.append(score)
    return steps, scores


def learning_curves(run: Path, best_model_by: BestModelBy, best_step: int | None = None) -> Section:
    """Return the section with the run's curves; `best_step` is the step of the best model."""
    curves = read_curves(run)
    plots = {}
    for tag, colours in (("train/", LOSS_COLOURS), ("valid/", METRIC_COLOURS)):
        if drawn_curves := {name: curves[tag + name] for name in colours if tag + name in curves}:
            plots[tag] = drawn_curves
    if not plots:
        problem = "The run has no TensorBoard events to draw: tracker has no tensorboard."
        return Section("Learning curves", [problem])
    figure, all_axes = new_figure(len(plots))
    for axes, (tag, plot_curves) in zip(all_axes, plots.items()):
        for name, (steps, values) in plot_curves.items():
            colour = (LOSS_COLOURS | METRIC_COLOURS)[name]
            axes.plot(steps, values, label=name, color=colour, **_style(len(steps)))
        axes.set(title=QUESTIONS[tag], xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if tag == "valid/" and "auc" in plot_curves:
            axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    if best_model_by == "auc_and_gauc" and "valid/gauc" not in curves:
        best_model_by = "auc"
    steps, scores = selection_curve(curves, best_model_by)
    paragraphs, verdicts = [], []
    if steps:
        best = steps[scores.index(max(scores))] if best_step is None else best_step
        all_axes[-1].axvline(best, color=GREY, linestyle="--", label="best model")
        paragraphs = [_best_text(best, steps, scores, selection_text(best_model_by))]
        verdicts = [_trend(best, steps)]
    for axes in all_axes:
        axes.legend()
    caption = "Losses of training, and metrics of the validation split, by step."
    drawing = drawn("learning-curves", figure, caption)
    return Section("Learning curves", paragraphs, [drawing], verdicts=verdicts)


def _trend(best: int, steps: list[int]) -> str:
    if len(steps) < FEWEST_OF_A_LINE:
        return f"{len(steps)} validation(s) cannot show whether longer training would help."
    if best == steps[-1]:
        return f"The last of {len(steps)} validations is the best one: longer training may help."
    return (
        f"Validation is best after step {best:,} of {steps[-1]:,}: longer training does not help."
    )


def _best_text(best: int, steps: list[int], scores: list[float], name: str) -> str:
    best_score = dict(zip(steps, scores)).get(best, float("-inf"))
    if best_score < max(scores) - ROUNDING:
        return (
            f"The model that this page shows is of step {best:,}, but by these events the {name} "
            "of another step is better: event files are damaged, missing or of another run."
        )
    return (
        f"The {name} of validation is best after step {best:,}: {abs(best_score):.4f}. The model "
        "of that step is the one that this page shows; the last validation, after step "
        f"{steps[-1]:,}, has {abs(scores[-1]):.4f}."
    )


def _style(num_points: int) -> dict[str, Any]:
    """Return marker and line of a curve; few points get no line, as it would suggest a trend."""
    return {
        "marker": "o" if num_points <= MARKED_POINTS else "",
        "linestyle": "-" if num_points >= FEWEST_OF_A_LINE else "none",
    }


SHOWN = {"auc": "AUC", "gauc": "GAUC", "ne": "normalised entropy", "rmse": "RMSE", "mae": "MAE"}
COLOURS = dict(zip(SUBSETS, (BLUE, GREY, ORANGE, "#7a4f9a")))


def prequential(run: Path, has_probabilities: bool) -> Section:
    """Return the section on a continual run, with a table row and a point per partition."""
    lines = ContinualFolder(run).metrics()
    if not lines:
        return Section("Partitions", ["One partition is trained on, and none was scored before."])
    names = {
        name: title
        for name, title in SHOWN.items()
        if any(line.get(name) is not None for line in lines) and (name != "ne" or has_probabilities)
    }
    head = ("partition", *names.values(), "GAUC cold", "GAUC unseen", "rows")
    rows = []
    for line in lines:
        gaucs = [_of(line, subset).get("gauc") for subset in ("cold", "unseen")]
        numbers = (*map(line.get, names), *gaucs)
        cells = ["–" if number is None else f"{number:,.4f}" for number in numbers]
        rows.append([line["partition"], *cells, f"{line['rows']:,}"])
    paragraphs = [
        f"{len(lines)} partitions were scored before they were trained on; the model of this page "
        f"is trained up to {ContinualFolder(run).read().trained[-1].name}."
    ]
    return Section("Partitions", paragraphs, _by_partition(lines, names), [Table(head, rows)])


def _by_partition(lines: list[dict[str, Any]], names: dict[str, str]) -> list[Drawing]:
    """Return a list with the figure of metrics by partition; empty if no metric can be drawn."""
    shown = [name for name in names if name in METRIC_COLOURS]
    if not shown:
        return []
    figure, all_axes = new_figure(len(shown))
    for axes, name in zip(all_axes, shown):
        for subset in SUBSETS:
            values = [_of(line, subset).get(name) for line in lines]
            points = [(index, value) for index, value in enumerate(values) if value is not None]
            if points:
                style = _style(len(points))
                axes.plot(*zip(*points), label=subset, color=COLOURS[subset], **style)
        axes.set(title=f"Does {names[name]} hold on new partitions?", xlabel="partition")
        axes.legend()
    caption = "Metrics of each partition by the model that was trained on all before it."
    return [drawn("prequential", figure, caption)]


def _of(line: dict[str, Any], subset: str) -> dict[str, Any]:
    metrics: dict[str, Any] = line if subset == "all" else line[subset]
    return metrics


# Fewest and most training impressions of an item, by bucket.
BUCKETS = {"0": (0, 0), "1–4": (1, 4), "5–19": (5, 19), "20–99": (20, 99), "100+": (100, np.inf)}
NAMES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss"}
NAMES_OF_NUMBERS = {"rmse": "RMSE", "mae": "MAE"}
UNTRAINED = (
    "An item without training impressions has an untrained ID vector: the model knows it only by "
    "its content, its other features and the user."
)


def metrics_by_count(rows: ScoredRows, counts: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return metrics by bucket; `counts`, int64 [N], are training impressions of rows' items."""
    return {
        name: rows.metrics((counts >= lower) & (counts <= upper))
        for name, (lower, upper) in BUCKETS.items()
    }


def item_popularity(scores: SplitScores, split: str, has_probabilities: bool) -> Section:
    """Return the section on quality by training impressions, of the first label's rows."""
    labels, logits, loss = scores.labels[:, 0], scores.logits[:, 0], scores.loss_of(0)
    rows = ScoredRows(labels, logits, scores.groups, scores.weights, loss)
    buckets = metrics_by_count(rows, scores.counts)
    names = NAMES if loss == "bce" else NAMES_OF_NUMBERS
    if not has_probabilities:
        names = {name: title for name, title in names.items() if name != "logloss"}
    table = metrics_table("training impressions", names, buckets)
    if loss != "bce":
        return Section("Quality by item popularity", [UNTRAINED], [], [table])
    paragraphs, drawings = [UNTRAINED], []
    if any(values["auc"] is not None for values in buckets.values()):
        drawings = [_bars(buckets, split)]
    else:
        paragraphs.append("No figure: the items of each range have rows of one label only.")
    return Section("Quality by item popularity", paragraphs, drawings, [table])


def _bars(buckets: dict[str, dict[str, Any]], split: str) -> Drawing:
    figure, (axes,) = new_figure(1)
    positions = np.arange(len(buckets))
    for shift, name, colour in ((-0.2, "auc", BLUE), (0.2, "gauc", ORANGE)):
        heights = np.array([values[name] for values in buckets.values()], np.float64)
        axes.bar(positions + shift, heights, 0.38, color=colour, label=name.upper())
        for x, height in zip(positions + shift, heights):
            if not np.isnan(height):
                inside = "white" if height > 0.1 else "black"
                axes.text(x, 0.03, f"{height:.3f}", ha="center", color=inside)
    axes.axhline(0.5, color="black", linewidth=1)
    names = [f"{name}\n{values['num_samples']:,} rows" for name, values in buckets.items()]
    axes.set_xticks(positions, names)
    title = "Are rare and new items ranked as well as frequent ones?"
    axes.set(title=title, xlabel="training impressions of the item", ylim=(0, 1))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    caption = (
        f"AUC and GAUC of the {split} split by the item's training impressions. The line at 0.5 is "
        "chance; a bar is missing where the rows have one label only. `recsys compare` tests "
        "differences of two models."
    )
    return drawn("quality-by-popularity", figure, caption)
