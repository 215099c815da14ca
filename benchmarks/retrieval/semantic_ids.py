"""Semantic ids of trained content beside those of frozen content, as features of a model of IDs.

    python -m benchmarks.retrieval.semantic_ids --out runs/bench

The MovieLens log lies in partitions in the order of time. Before each of the last ones a model with
content is trained on all earlier rows. Its content vectors, and the outputs of its frozen encoders,
are clustered into codes of the same sizes. A model of IDs alone is trained on the same rows without
codes, and with either of them as an `ids` column, and ranks the rows of the partition. Metrics are
pooled over the partitions, of all items, of cold ones (fewer than 5 training rows) and of unseen
ones; differences have the intervals of a paired bootstrap of users. Finished runs in `--out` are
read, not trained again.

Shapes: I items, V width.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.continual.log import view_before, write_log
from benchmarks.continual.new_rows import METRICS, QUICK, QUICK_PARTITIONS, QUICK_ROWS, RECIPE
from benchmarks.continual.ways import WITHOUT_CONTENT
from benchmarks.quality.runs import Training, finish
from benchmarks.results import RESULTS, Result, require_own_folder, write_result
from recsys.build import Job
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.pooling import mean_token
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.bootstrap import paired_difference, pooled_metric
from recsys.evaluation.predict import load_run
from recsys.evaluation.scores import SplitScores, read_scores, scores_file
from recsys.serving.new_items.item_encoder import ITEMS_PER_CALL
from recsys.serving.retrieval.index import unit
from recsys.serving.retrieval.item_vectors import item_vectors
from recsys.serving.retrieval.semantic_ids import (
    COLUMN,
    Codebooks,
    collision_report,
    write_dataset_with,
)

NONE, TRAINED, FROZEN = "no codes", "trained content", "frozen content"
WAYS = (NONE, TRAINED, FROZEN)
CODED = {TRAINED: "trained", FROZEN: "frozen"}  # names of their folders
PAIRS = ((TRAINED, NONE), (FROZEN, NONE), (TRAINED, FROZEN))
QUICK_CODES = 16
Scores = dict[str, list[SplitScores]]  # by way, of each window


def semantic_ids(
    out: Path,
    partitions: int = 10,
    rolling: int = 3,
    epochs: int = 1,
    levels: int = 3,
    codes: int = 64,
    seeds: int = 1,
    source: Path | None = None,
    jobs: int = 2,
    quick: bool = False,
    results: Path = RESULTS,
) -> None:
    """Train the models, write the codes and the page.

    Args:
        out: folder for datasets and runs.
        partitions: number of partitions of the log.
        rolling: last partitions, before each of which models are trained.
        epochs: epochs of each model.
        levels: codes of an item.
        codes: codes of a level.
        seeds: models of IDs of each kind and partition.
        source: MovieLens; default: the bundled sample.
        jobs: trainings side by side, one thread each.
        quick: try small sizes.
        results: folder for the figures.
    """
    require_own_folder(quick, results)
    folder, words = out / "semantic_ids", QUICK if quick else ()
    if quick:
        partitions, rolling, codes = QUICK_PARTITIONS, 1, QUICK_CODES
    names = write_log(folder, partitions, source, QUICK_ROWS if quick else None)
    views = {name: view_before(folder, names, names.index(name)) for name in names[-rolling:]}
    asked = ("--epochs", str(epochs))
    with_content = {
        name: Training(
            folder / "runs" / f"content-{name}", str(view), RECIPE, 0, words + asked, name
        )
        for name, view in views.items()
    }
    finish(list(with_content.values()), jobs, None)
    data, reports = {(NONE, name): view for name, view in views.items()}, {}
    for (way, short), name in itertools.product(CODED.items(), views):
        data[way, name] = folder / "coded" / f"{short}-{levels}x{codes}-{name}"
        run = with_content[name].folder
        reports[way, name] = _code(run, way, data[way, name], levels, codes)
    runs = folder / "runs" / f"{levels}x{codes}"
    scores = _ranked(runs, data, (*WITHOUT_CONTENT, *asked), seeds, jobs)
    write_result(_result(scores, reports, levels, codes), results)


def _code(run: Path, way: str, out: Path, levels: int, codes: int) -> dict[str, Any]:
    """Write the dataset of a run with codes of its items; return the collision report."""
    report = out.with_suffix(".json")
    if not (out.exists() and report.exists()):
        with joined_ranks("cpu") as ranks:
            job = load_run(run, None, ranks, "cpu", ["--compile", "false"])
            job.model.eval()
            items = item_vectors(job, "content")
            vectors = items.vectors if way == TRAINED else frozen_vectors(job, items.rows)
        books = Codebooks.fit(vectors, levels, codes)
        ids = pa.table(
            {job.schema.target_item: items.ids, COLUMN: pa.array(list(books.ids_of(vectors)))}
        )
        found = collision_report(books.codes_of(vectors), items.ids.to_pylist(), codes)
        out.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(found))
        if not out.exists():
            write_dataset_with(job.root, job.schema, ids, COLUMN, books.num_ids, out)
    return json.loads(report.read_text())


@torch.no_grad()
def frozen_vectors(
    job: Job,
    rows: np.ndarray,  # int64 [I]
) -> np.ndarray:  # float32 [I, V]
    """Return the outputs of a run's encoders for items, of unit length by modality.

    They are as before training if the recipe does not train its encoders.
    """
    branch, store = job.em3.content, job.store
    assert branch is not None and store is not None

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), ITEMS_PER_CALL):
            content, means = store.gather(rows[start : start + ITEMS_PER_CALL]), []
            for name, encoder in branch.encoders.items():
                assert isinstance(encoder, Encoder)
                tokens = encoder.encode(content[name])
                means.append(unit(mean_token(tokens.values, tokens.mask).float().numpy()))
            yield np.concatenate(means, axis=1)

    return np.concatenate(list(blocks()))


def _ranked(
    runs: Path,
    data: dict[tuple[str, str], Path],
    words: Sequence[str],
    seeds: int,
    jobs: int,
) -> list[Scores]:
    """Train models of IDs on the datasets by way and window; return the scores by seed."""
    trainings = {
        (seed, way, name): Training(
            runs / f"ids_{CODED.get(way, 'none')}-{name}-{seed}",
            *(str(dataset), RECIPE, seed, tuple(words), f"{way}, {name}"),
            leaves=("scores_test.parquet",),
        )
        for seed in range(seeds)
        for (way, name), dataset in data.items()
    }
    finish(list(trainings.values()), jobs, None)
    scores: list[Scores] = [{way: [] for way in WAYS} for _ in range(seeds)]
    for (seed, way, _), training in trainings.items():
        scores[seed][way].append(read_scores(scores_file(training.folder, "test")))
    return scores


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*value)


def _result(
    scores: list[Scores], reports: dict[tuple[str, str], dict[str, Any]], levels: int, codes: int
) -> Result:
    records: list[dict[str, Any]] = []
    for way in WAYS:
        values = {
            f"{metric} {part}": float(
                np.mean([pooled_metric(of[way], metric, part) for of in scores])
            )
            for metric, part in METRICS
        }
        records.append({"benchmark": "semantic_ids", "codes": way, **values})
    for first, second in PAIRS:
        record: dict[str, Any] = {"benchmark": "semantic_ids", "codes": f"{first} - {second}"}
        for metric, part in METRICS:
            by_seed = ([of[way] for of in scores] for way in (second, first))
            interval = paired_difference(*by_seed, metric, part)
            ends = None if interval is None else [interval.value, interval.low, interval.high]
            record[f"{metric} {part}"] = ends
        records.append(record)

    def draw(figure: Figure) -> None:
        for place, (metric, part) in enumerate(METRICS[2:]):
            axes = figure.add_subplot(2, 2, place + 1)
            for number, record in enumerate(records[len(WAYS) :]):
                if (ends := record[f"{metric} {part}"]) is not None:
                    value, low, high = ends
                    axes.errorbar(value, number, xerr=[[value - low], [high - value]], fmt="o")
            axes.axvline(0, color="gray")
            titles = [f"{first} - {second}" for first, second in PAIRS]
            axes.set_yticks(range(len(PAIRS)), titles if place % 2 == 0 else [""] * len(PAIRS))
            axes.set_xlabel(f"{metric.upper()} of {part} items")

    names = [f"{metric} {part}" for metric, part in METRICS]
    rows = [[record["codes"], *(_cell(record[name]) for name in names)] for record in records]
    columns = ["codes", *(name.replace("auc", "AUC").replace("g", "G") for name in names)]
    return Result(
        "semantic_ids",
        "Semantic ids of trained and of frozen content",
        records,
        columns,
        rows,
        draw,
        [_reading(scores, reports, levels, codes)],
    )


def _reading(
    scores: list[Scores], reports: dict[tuple[str, str], dict[str, Any]], levels: int, codes: int
) -> str:
    counts = [window.counts for window in scores[0][NONE]]
    rows = np.concatenate(counts)
    shared = {
        way: np.mean(
            [of["colliding"] / of["items"] for (each, _), of in reports.items() if each == way]
        )
        for way in CODED
    }
    return (
        f"{levels} levels of {codes} codes; {len(counts)} windows, {len(scores)} seeds; "
        f"{len(rows):,} rows, {int((rows < 5).sum()):,} of cold and {int((rows == 0).sum()):,} of "
        "unseen items. Items that share all codes with another: "
        + ", ".join(f"{share:.0%} by {way}" for way, share in shared.items())
        + ". Below the metrics: differences with 95 % intervals."
    )


if __name__ == "__main__":
    auto_cli(semantic_ids, as_positional=False)
