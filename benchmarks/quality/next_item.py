"""The next item of all: a retrieval model beside popularity, item-CF, content and their blends.

    python -m benchmarks quality next-item --runs '["RUN", "RUN"]'

Measures finished runs of one dataset, such as seeds of the recipe `next_item`, on their test rows.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, write_result
from recsys.distributed.ranks import joined_ranks
from recsys.serving.retrieval.baselines import compare_with_baselines


def next_item(runs: list[Path], results: Path = RESULTS) -> None:
    """Compare runs with baselines and write the page.

    Args:
        runs: finished runs of two_tower on one dataset.
        results: folder for the figures.

    Raises:
        ValueError: a run is not finished, or no retrieval model.
    """
    with joined_ranks("cpu") as ranks:
        reports = [compare_with_baselines(run, None, ranks) for run in runs]
    write_result(_result(reports), results)


def _result(reports: list[dict[str, Any]]) -> Result:
    parts = [("all", name) for name in reports[0]["model"]["all"] if "@" in name]
    parts.append(("unseen", parts[0][1]))
    rows = [[name, *(_mean_cell(reports, name, *part) for part in parts)] for name in reports[0]]
    columns = ["scores", *(name if part == "all" else f"{name} {part}" for part, name in parts)]
    counts = reports[0]["model"]
    reading = [
        f"Means of {len(reports)} runs on {counts['all']['num_samples']:,} test rows, "
        f"{counts['unseen']['num_samples']:,} of them of items without a training row, by exact "
        "search of all items. The weights of a blend and the decay of a history are chosen on "
        "validation. Content neighbours have the content vectors of the run.",
        *(_gain(reports, number, name) for number in range(len(reports)) for name in MODELS),
    ]
    records = [{"benchmark": "next_item", "run": n, **report} for n, report in enumerate(reports)]
    title = "Does a sequence tower find the next item better than item-CF, content and their blend?"
    return Result("next_item", title, records, columns, rows, None, reading)


MODELS = ("model", "blend with model")


def _mean_cell(reports: list[dict[str, Any]], name: str, part: str, metric: str) -> str:
    values = [report[name][part][metric] for report in reports]
    return "-" if None in values else f"{fmean(values):.4f}"


def _gain(reports: list[dict[str, Any]], number: int, name: str) -> str:
    mean, low, high = reports[number][name]["gain over blend"]
    return (
        f"Run {number + 1}, {name} over the blend, NDCG at the first depth: {mean:+.4f} "
        f"[{low:+.4f}, {high:+.4f}], 95 % over rows."
    )


if __name__ == "__main__":
    auto_cli(next_item, as_positional=False)
