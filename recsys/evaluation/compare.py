"""Run `recsys compare`: metrics of runs side by side, and which differences are significant."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.plan_text import align_columns
from recsys.data.item_frequency import SUBSETS, frequency_masks
from recsys.evaluation.bootstrap import metric_users, metrics_of, paired_difference, pooled_metric
from recsys.evaluation.metrics import FEW_USERS_NOTE, MIN_USERS, in_parentheses
from recsys.evaluation.scores import (
    SplitScores,
    check_model,
    check_same_rows,
    read_scores,
    scores_file,
    with_labels,
)

SAMPLES = 2000


def compare_runs(runs: Sequence[Path], split: str) -> dict[str, Any]:
    """Compute metrics of each run by subset of the items, and differences to the first run.

    The metrics are AUC and GAUC, or RMSE and MAE for a numeric label; only the first label counts.
    Fewer than two runs, and runs without scores of equal rows, are a ValueError.
    """
    if len(runs) < 2:
        raise ValueError(f"--runs names {len(runs)} run; compare two or more")
    first, *other_scores = [_scores_of(run, split) for run in runs]
    scores = [first]
    for run, other in zip(runs[1:], other_scores, strict=True):
        scores.append(with_labels(other, first.label_names, str(run)))
        check_same_rows(first, scores[-1], f"{runs[0]} and {run}")
    metrics, counted = metrics_of(first.loss_of(0)), first.counted(0)
    return {
        "split": split,
        "label": first.label_names[0],
        "metrics": list(metrics),
        "users": len(np.unique(counted.groups)),
        "samples": SAMPLES,
        "rows": {name: int(rows.sum()) for name, rows in frequency_masks(counted.counts).items()},
        "metric_users": {
            subset: {metric: metric_users([first], metric, subset) for metric in metrics}
            for subset in SUBSETS
        },
        "runs": [
            {"run": str(run), **_compared(first, other)}
            for run, other in zip(runs, scores, strict=True)
        ],
    }


def _scores_of(run: Path, split: str) -> SplitScores:
    path = scores_file(run, split)
    if not path.is_file():
        raise ValueError(
            f"{run}: holds no scores of the {split} split ({path.name}); write them with `recsys "
            f"evaluate --run {run} --split {split}`"
        )
    check_model(path, run)
    return read_scores(path)


def _compared(first: SplitScores, other: SplitScores) -> dict[str, Any]:
    by_subset: dict[str, Any] = {}
    metrics = metrics_of(first.loss_of(0))
    for subset in SUBSETS:
        by_subset[subset] = {metric: pooled_metric([other], metric, subset) for metric in metrics}
        if other is not first:
            intervals = {
                metric: paired_difference([[first]], [[other]], metric, subset, SAMPLES)
                for metric in metrics
            }
            by_subset[subset]["difference"] = {
                metric: interval and {**asdict(interval), "excludes_zero": interval.excludes_zero}
                for metric, interval in intervals.items()
            }
    return by_subset


def format_comparison(report: dict[str, Any]) -> str:
    """Format the result of `compare_runs` as a plain text table; undefined values are `-`."""
    first = report["runs"][0]["run"]
    head = f"{report['split']}, {report['rows']['all']:,} rows of {report['users']:,} users"
    names = report["metrics"]
    columns = [column for name in names for column in (name, "difference", "95 % interval")]
    rows = [("items", *columns, "rows", "run")]
    for subset in SUBSETS:
        users = report["metric_users"][subset]
        for run in report["runs"]:
            cells = [cell for name in names for cell in _cells(run[subset], name, users[name])]
            rows.append((subset, *cells, f"{report['rows'][subset]:,}", run["run"]))
    return (
        f"{head}\n{align_columns(rows)}\n"
        f"Differences are those to {first}; intervals by a paired bootstrap over users with "
        f"{report['samples']:,} samples, wider for few users; - below {MIN_USERS} users. * marks "
        f"one that excludes 0. {FEW_USERS_NOTE}"
    )


def _cells(metrics: dict[str, Any], name: str, users: int) -> tuple[str, str, str]:
    value = "-" if metrics[name] is None else in_parentheses(f"{metrics[name]:.4f}", users)
    if "difference" not in metrics:
        return value, "", ""
    difference = metrics["difference"][name]
    if difference is None:
        return value, "-", "-"
    star = " *" if difference["excludes_zero"] else ""
    interval = f"[{difference['low']:+.4f}, {difference['high']:+.4f}]{star}"
    return value, f"{difference['value']:+.4f}", interval
