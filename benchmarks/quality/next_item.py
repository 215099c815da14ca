"""Compare a retrieval model of the next item with popularity, item-CF, content and their blends.

    python -m benchmarks quality next-item --runs '["RUN", "RUN"]'

Measures finished runs of one dataset, such as seeds of the recipe `next_item`, on their test rows.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jsonargparse import auto_cli

from benchmarks.peers.trainings import GIGABYTE
from benchmarks.quality.sequence_models import MODELS, sequence_models
from benchmarks.results import RESULTS, Result, write_result
from recsys.checkpoint.run_folder import METRICS
from recsys.distributed.ranks import joined_ranks
from recsys.serving.retrieval.baselines import RowGains, compare_with_baselines, format_interval


def next_item(
    runs: list[Path],
    recbole: Path | None = None,
    recbole_models: tuple[str, ...] = MODELS,
    results: Path = RESULTS,
    page: str = "next_item",
) -> None:
    """Compare runs with baselines and write the page.

    Args:
        runs: finished runs of two_tower on one dataset.
        recbole: folder for RecBole's environment and trainings of its sequence models on the same
            rows, which are then compared, too.
        recbole_models: those of SASRec, GRU4Rec and BERT4Rec that are compared.
        results: folder for the figures.
        page: name of its files, such as next_item_movielens.

    Raises:
        ValueError: a run is not finished, or no retrieval model.
    """
    with joined_ranks("cpu") as ranks:
        compared = [compare_with_baselines(run, None, ranks) for run in runs]
        peers = {} if recbole is None else sequence_models(runs[0], recbole, recbole_models, ranks)
    reports, gains = map(list, zip(*compared, strict=True))
    for report, run_gains in zip(reports, gains, strict=True):
        report |= {name: peer.metrics for name, peer in peers.items()}
        run_gains.ndcg.update({name: peer.gains for name, peer in peers.items()})
    costs = {name: (peer.seconds, peer.peak) for name, peer in peers.items()}
    costs["model"] = _cost(runs)
    write_result(_result(page, reports, gains, costs), results)


def _cost(runs: list[Path]) -> tuple[float, float]:
    """Return the mean seconds and peak GB of trainings."""
    trainings = [json.loads((run / METRICS).read_text())["train"] for run in runs]
    peak = fmean(training["peak_bytes"] for training in trainings)
    return fmean(training["seconds"] for training in trainings), peak / GIGABYTE


def _result(
    page: str,
    reports: list[dict[str, Any]],
    gains: list[RowGains],
    costs: dict[str, tuple[float, float]],
) -> Result:
    pairs = [("all", name) for name in reports[0]["model"]["all"] if "@" in name]
    pairs.append(("unseen", pairs[0][1]))
    rows = [
        [name, *(_mean_cell(reports, name, *pair) for pair in pairs), *_cost_cells(costs.get(name))]
        for name in reports[0]
    ]
    columns = ["scores", *(key if subset == "all" else f"{key} {subset}" for subset, key in pairs)]
    columns += ["training, s", "peak, GB"]
    counts = reports[0]["model"]
    reading = [
        f"Means of {len(reports)} runs on {counts['all']['num_samples']:,} test rows of "
        f"{len(set(gains[0].users)):,} users, "
        f"{counts['unseen']['num_samples']:,} of them of items without a training row, by exact "
        "search of all items. The weights of a blend and the decay of a history are chosen on "
        "validation. `transitions` counts which items followed those of the history. `content` "
        "compares the content vectors of the run, `encoders` the outputs of its encoders, `text` "
        "the words by TF-IDF. `blend` has all baselines; `blend with model`, "
        "which `export-vectors --blend true` serves, has the model, the nearest texts, and the "
        "baselines but encoders and text.",
        *(_gain(gains, name, "blend") for name in MODEL_SCORES),
    ]
    if peers := [name for name in reports[0] if name.startswith("RecBole")]:
        reading.append(
            "RecBole's models have its settings but a width of 64, batches of 256, cross-entropy "
            "over all items and histories of 50; one seed, and the epoch that validation chooses."
        )
        reading += [_gain(gains, "blend with model", name) for name in peers]
    records = [{"benchmark": "next_item", "run": n, **report} for n, report in enumerate(reports)]
    title = "Does a sequence tower find the next item better than item-CF, content and their blend?"
    return Result(page, title, records, columns, rows, None, reading)


MODEL_SCORES = ("model", "blend with model")


def _mean_cell(reports: list[dict[str, Any]], name: str, subset: str, metric: str) -> str:
    values = [report[name][subset][metric] for report in reports]
    return "-" if None in values else f"{fmean(values):.4f}"


def _cost_cells(cost: tuple[float, float] | None) -> tuple[str, str]:
    return ("-", "-") if cost is None else (f"{cost[0]:,.0f}", f"{cost[1]:.2f}")


def _gain(gains: list[RowGains], name: str, baseline: str) -> str:
    mean_gains = {
        key: torch.stack([run.ndcg[key] for run in gains]).mean(dim=0) for key in (name, baseline)
    }
    gain = format_interval(replace(gains[0], ndcg=mean_gains).gain_over(name, baseline))
    return f"{name} over {baseline}, NDCG at the first depth, mean of the runs: {gain}, 95 %."


if __name__ == "__main__":
    auto_cli(next_item, as_positional=False)
