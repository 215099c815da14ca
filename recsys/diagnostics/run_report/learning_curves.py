"""Draws losses and validation metrics by step, read from the run's TensorBoard events."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recsys.config import BestModelBy
from recsys.diagnostics.run_report.page import BLUE, GREY, ORANGE, Section, drawn, new_figure
from recsys.evaluation.model_selection import METRICS, selection_score, selection_words

Curve = tuple[list[int], list[float]]  # steps and values


def read_curves(run: Path) -> dict[str, Curve]:
    """Return every scalar of the run by tag, such as `train/loss` and `valid/auc`, by step.

    Empty if TensorBoard is not among the run's trackers.
    """
    if not (run / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        values = events.Scalars(tag)
        curves[tag] = [value.step for value in values], [value.value for value in values]
    return curves


def selection_curve(curves: dict[str, Curve], best_model_by: BestModelBy) -> Curve:
    """Return the score that chose the best model, by step; the first maximum is the best model.

    Empty if the run has not written it.
    """
    of_steps: dict[int, dict[str, float]] = {}
    for name in METRICS[best_model_by]:
        for step, value in zip(*curves.get(f"valid/{name}", ([], []))):
            of_steps.setdefault(step, {})[name] = value
    scores = {step: selection_score(of_step, best_model_by) for step, of_step in of_steps.items()}
    known = {step: score for step, score in sorted(scores.items()) if score is not None}
    return list(known), list(known.values())


def learning_curves(run: Path, best_model_by: BestModelBy) -> Section:
    """Return the section; curves that the run has not written are left out."""
    curves = read_curves(run)
    steps, scores = selection_curve(curves, best_model_by)
    named = selection_words(best_model_by)
    figure, (losses, quality) = new_figure(2)
    parts = {"ranking": BLUE, "contrastive": ORANGE, "loss": GREY}
    _draw(losses, {name: curves.get(f"train/{name}") for name in parts}, parts)
    losses.set(title="training loss", xlabel="step")
    names = {"auc": BLUE, "gauc": ORANGE}
    _draw(quality, {name: curves.get(f"valid/{name}") for name in names}, names, marker="o")
    quality.set(title="validation", xlabel="step")
    words = []
    if steps:
        best = steps[scores.index(max(scores))]
        quality.axvline(best, color=GREY, linestyle="--", label="best model")
        words = [
            f"The {named} of validation is highest after step {best:,}: {max(scores):.4f}. The "
            "model of that step is the one that this page shows; the last validation, after step "
            f"{steps[-1]:,}, has {scores[-1]:.4f}."
        ]
    for axes in (losses, quality):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    caption = "Losses of training, and AUC and GAUC of the validation split, by step."
    return Section("Learning curves", words, [drawn("learning-curves", figure, caption)])


def _draw(
    axes: Axes, curves: dict[str, Curve | None], colours: dict[str, str], marker: str = ""
) -> None:
    for name, curve in curves.items():
        if curve is not None:
            axes.plot(*curve, label=name, color=colours[name], marker=marker)
