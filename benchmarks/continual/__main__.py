"""Compare continual training with other update methods, and time a partition.

    python -m benchmarks.continual --out runs/bench

Four methods score each of 20 MovieLens partitions before training on it: the continual run,
retraining from scratch, the continual model frozen halfway, and a run without content.
Partitions of a synthetic dataset are timed from arrival to checkpoint, beside a plain epoch.
Exits with 1 if an aim is missed.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.continual.runs import (
    CONTINUAL,
    FROZEN,
    ID_ONLY,
    RETRAINED,
    WAYS,
    Arrival,
    Scores,
    frozen_at,
    measure_arrival,
    retrain,
    rows_trained,
    scores_of_walk,
    walk_all,
    write_log,
)
from benchmarks.results import RESULTS, Result, require_other_folder, write_result
from benchmarks.settings import Device
from recsys.evaluation.bootstrap import paired_difference, pooled_metric

RECIPE = Path(__file__).parents[1] / "settings" / "continual.yaml"
# Passes over the first two partitions with the lowest log loss on a held-out fifth, the mean of
# four seeds: first .679, .603, .597, .600, .602 for 1 to 5 passes; second .590, .575, .580.
# GAUC is best at [5, 3], but continues worse: -.0042 and -.0046 beside retraining by two seeds,
# [4, 2] -.0022 and -.0033, [3, 2] -.0021 and -.0025.
FIRST_PASSES = [3, 2]
MIN_DIFFERENCE, MAX_ROWS, MAX_TIME = -0.003, 0.15, 1.15
COLUMNS = (("gauc", "all"), ("gauc", "cold"), ("gauc", "unseen"), ("auc", "all"))
QUICK = ("--content.modalities", '{text: {kind: text, column: text, encoder: "random:bert"}}')
QUICK_ROWS, QUICK_PARTITIONS = 4000, 4


def benchmark(
    out: Path,
    partitions: int = 20,
    source: Path | None = None,
    retrained_from: int = 2,
    epochs: int = 2,
    arrival_rows: int = 131_072,
    jobs: int = 2,
    device: Device = "cpu",
    quick: bool = False,
    results: Path = RESULTS,
) -> bool:
    """Measure, and return whether the aims are reached.

    Args:
        out: folder for datasets and runs.
        partitions: number of partitions of the log.
        source: MovieLens; default: the bundled sample.
        retrained_from: number of the first partition before which a model is trained from scratch.
        epochs: epochs of a model trained from scratch, of which the best is used.
        arrival_rows: rows of a partition whose time is measured.
        jobs: trainings side by side, one thread each.
        device: cpu, or cuda for a GPU per rank.
        quick: try small sizes.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    options: tuple[str, ...] = ("--device", device, *(QUICK if quick else ()))
    rows = QUICK_ROWS if quick else None
    partitions = QUICK_PARTITIONS if quick else partitions
    names = write_log(out, partitions, source, rows)
    arrival = measure_arrival(out, 2048 if quick else arrival_rows, device=device)
    passes = ("--continual.first_passes", str(FIRST_PASSES))
    walk_all(RECIPE, out, names, (*options, *passes))
    walked = scores_of_walk(out / "runs" / "continual", names)
    training_options = (*options, "--epochs", str(epochs))
    retrained, rows_retrained = retrain(
        RECIPE, out, names, retrained_from - 1, training_options, jobs
    )
    scores = {
        CONTINUAL: walked,
        RETRAINED: retrained,
        FROZEN: frozen_at(out / "runs" / "half", names, walked),
        ID_ONLY: scores_of_walk(out / "runs" / "id_only", names),
    }
    trained = {
        CONTINUAL: rows_trained(out, names, partitions - 1, FIRST_PASSES),
        RETRAINED: rows_retrained,
        FROZEN: rows_trained(out, names, partitions // 2, FIRST_PASSES),
        ID_ONLY: rows_trained(out, names, partitions - 1, FIRST_PASSES),
    }
    verdicts = _verdicts(scores, trained, names, arrival)
    write_result(_result(scores, trained, names, arrival, verdicts), results)
    return all(verdicts.values())


def _second_half(scores: dict[str, Scores], names: list[str]) -> list[str]:
    return [
        name
        for name in names[len(names) // 2 :]
        if all(name in way_scores for way_scores in scores.values())
    ]


def _verdicts(
    scores: dict[str, Scores], trained: dict[str, int], names: list[str], arrival: Arrival
) -> dict[str, bool]:
    common = [name for name in names if name in scores[CONTINUAL] and name in scores[RETRAINED]]
    ways = RETRAINED, CONTINUAL
    retrained, continual = ([scores[way][name] for name in common] for way in ways)
    gauc = [pooled_metric(side, "gauc", "all") or 0.0 for side in (retrained, continual)]
    interval = paired_difference([retrained], [continual], "gauc", "all")
    bounds = "" if interval is None else f" [{interval.low:+.4f}, {interval.high:+.4f}]"
    share = trained[CONTINUAL] / trained[RETRAINED]
    times = arrival.total / arrival.plain
    return {
        f"the continual model's pooled GAUC is {gauc[1] - gauc[0]:+.4f}{bounds} beside that of the "
        f"retrained one ({gauc[1]:.4f} and {gauc[0]:.4f}), at least {MIN_DIFFERENCE}": (
            gauc[1] - gauc[0] >= MIN_DIFFERENCE
        ),
        f"it trained on {share:.1%} of the rows that retraining did, of {MAX_ROWS:.0%} at most": (
            share <= MAX_ROWS
        ),
        f"from arrival to checkpoint {arrival.total:.1f} s for {arrival.rows:,} rows, "
        f"{times:.2f} times the {arrival.plain:.1f} s of a plain epoch, of {MAX_TIME} at most": (
            times <= MAX_TIME
        ),
    }


def _phase_text(arrival: Arrival) -> str:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in arrival.phases.items())
    return (
        f"Seconds of a partition of {arrival.rows:,} rows by phase: {phases}; its steps take "
        f"{arrival.plain:.2f} in a plain epoch, which makes no scores. Without them the partition "
        f"takes {(arrival.total - arrival.phases['score']) / arrival.plain:.2f} times that."
    )


def _result(
    scores: dict[str, Scores],
    trained: dict[str, int],
    names: list[str],
    arrival: Arrival,
    verdicts: dict[str, bool],
) -> Result:
    half = _second_half(scores, names)
    records: list[dict[str, Any]] = []
    for way in WAYS:
        pooled = {
            f"{metric} {subset}": pooled_metric([scores[way][key] for key in half], metric, subset)
            for metric, subset in COLUMNS
        }
        curve = {
            name: pooled_metric([scores], "gauc", "all") for name, scores in scores[way].items()
        }
        records.append(
            {"benchmark": "continual", "way": way, **pooled, "rows": trained[way], "gauc": curve}
        )
    columns = ["way", "GAUC", "GAUC cold", "GAUC unseen", "AUC", "rows trained on"]
    rows = [(record["way"], *_cells(record), f"{record['rows']:,}") for record in records]
    reading = [
        f"Aim {'reached' if is_reached else 'missed'}: {text}."
        for text, is_reached in verdicts.items()
    ]
    reading.append(
        f"Metrics are pooled over the last {len(half)} of {len(names)} partitions, which all ways "
        "scored before they had seen them; the first aim pools all partitions that both "
        "ways scored. The retrained model's epoch is the best on the partition that it scores. "
        f"Walks pass {FIRST_PASSES} times over their first partitions, as chosen on rows of these "
        "alone, and once over each later one."
    )
    reading.append(_phase_text(arrival))
    records.append({"benchmark": "continual", "way": "arrival", **arrival.phases})

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for way in WAYS:
            axes.plot(
                [names.index(name) + 1 for name in scores[way]],
                [pooled_metric([rows], "gauc", "all") or np.nan for rows in scores[way].values()],
                label=way,
                marker=".",
            )
        axes.set(xlabel="partition, scored before it is trained on", ylabel="GAUC")
        axes.legend()

    return Result("continual", "Continual training", records, columns, rows, draw, reading)


def _cells(record: dict[str, Any]) -> list[str]:
    values = [record[f"{metric} {subset}"] for metric, subset in COLUMNS]
    return ["-" if value is None else f"{value:.4f}" for value in values]


if __name__ == "__main__":
    sys.exit(0 if auto_cli(benchmark, as_positional=False) else 1)
