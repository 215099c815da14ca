"""Draws the metrics of a continual run by partition, each scored before it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recsys.checkpoint.partitions import ContinualFolder
from recsys.data.item_frequency import PARTS
from recsys.diagnostics.run_report.page import (
    BLUE,
    GREY,
    ORANGE,
    Section,
    Table,
    drawn,
    new_figure,
    number,
)

SHOWN = {"auc": "AUC", "gauc": "GAUC", "ne": "normalised entropy", "rmse": "RMSE", "mae": "MAE"}
COLOURS = dict(zip(PARTS, (BLUE, GREY, ORANGE, "#7a4f9a")))


def prequential(run: Path) -> Section:
    """Return the section on the continual run in a folder, a row and a point per partition."""
    lines = ContinualFolder(run).metrics()
    if not lines:
        return Section("Partitions", ["One partition is trained on, and none was scored before."])
    names = {name: words for name, words in SHOWN.items() if lines[-1].get(name) is not None}
    shown = [name for name in names if name in ("auc", "gauc", "rmse", "mae")]
    figure, all_axes = new_figure(len(shown))
    for axes, name in zip(all_axes, shown):
        for part in PARTS:
            values = [_of(line, part).get(name) for line in lines]
            points = [(place, value) for place, value in enumerate(values) if value is not None]
            axes.plot(
                *zip(*points), label=part, color=COLOURS[part], marker="."
            ) if points else None
        axes.set(title=names[name], xlabel="partition")
        axes.legend()
    caption = "Metrics of each partition by the model that was trained on all before it."
    head = ("partition", *names.values(), "GAUC cold", "GAUC unseen", "rows")
    rows = []
    for line in lines:
        part_gaucs = [_of(line, part).get("gauc") for part in ("cold", "unseen")]
        cells = [number(value) for value in (*map(line.get, names), *part_gaucs)]
        rows.append([line["partition"], *cells, f"{line['rows']:,}"])
    words = [
        f"{len(lines)} partitions were scored before they were trained on; the model of this page "
        f"is trained up to {ContinualFolder(run).read().trained[-1].name}."
    ]
    return Section(
        "Partitions", words, [drawn("prequential", figure, caption)], tables=[Table(head, rows)]
    )


def _of(line: dict[str, Any], part: str) -> dict[str, Any]:
    metrics: dict[str, Any] = line if part == "all" else line[part]
    return metrics
