"""Methods to keep a model up to date; each scores every partition before training on it."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.dataset import DatasetSize, write_dataset
from benchmarks.quality.runs import Training, finish
from benchmarks.settings import Device
from recsys.checkpoint.partitions import ContinualFolder, newest_run
from recsys.config import ContinualSettings
from recsys.data.item_frequency import ItemCounts
from recsys.data.movielens.prepare import prepare_movielens
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import score, split_interactions, split_scores
from recsys.evaluation.predict import load_run
from recsys.evaluation.scores import SplitScores, read_scores, scores_file
from recsys.training.continual.partition_run import num_passes

CONTINUAL, RETRAINED = "continual", "retrained from scratch"
FROZEN, ID_ONLY = "frozen after the first half", "ID-only continual"
WAYS = (CONTINUAL, RETRAINED, FROZEN, ID_ONLY)
WITHOUT_CONTENT = ("--content", "none", "--contrastive.weight", "0")
Scores = dict[str, SplitScores]


def walk(recipe: Path, folder: Path, name: str, *arguments: str) -> Path:
    """Run `recsys continual` over `folder/data` in a process of one thread; return its folder.

    Raises:
        RuntimeError: it failed; names its log.
    """
    run, log = folder / "runs" / name, folder / "runs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recsys.cli", "continual", "--config", str(recipe)]
    command += ["--data", str(folder / "data"), "--out", str(run), *arguments]
    with log.open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, stdout=output, stderr=output, env=environment)
    if process.returncode:
        raise RuntimeError(f"{name} failed; see {log}")
    return run


def scores_of_walk(run: Path, names: list[str]) -> Scores:
    """Return the scores that a walk has made of its partitions."""
    folder = ContinualFolder(run)
    return {name: read_scores(folder.scores_of(name)) for name in names[1:]}


def frozen_at(run: Path, names: list[str], walked: Scores) -> Scores:
    """Score the second half by the model of a walk over the first half.

    `walked` are the scores of the whole walk, whose counts say which items are cold.
    """
    scores_by_name = {}
    with joined_ranks("cpu") as ranks:
        job = load_run(newest_run(run), None, ranks, "cpu")
        for name in names[len(names) // 2 :]:
            job.train_folder = f"train/{name}"
            scored = score(job, split_interactions(job, "train"))
            scores = split_scores(job.schema, scored, ItemCounts.sum_of([]))
            scores_by_name[name] = replace(scores, counts=walked[name].counts)
    return scores_by_name


def retrain(
    recipe: Path, folder: Path, names: list[str], first: int, arguments: tuple[str, ...], jobs: int
) -> tuple[Scores, int]:
    """Train from scratch on all partitions before each; return the scores and the rows trained on.

    The best epoch is chosen on the scored partition, which favours retraining.
    """
    trainings = {}
    for number in range(first, len(names)):
        data = str(view_before(folder, names, number))
        run = folder / "runs" / f"retrained-{names[number]}"
        title = f"{RETRAINED}, {names[number]}"
        trainings[names[number]] = Training(run, data, recipe, 0, arguments, title)
    # The largest first, so that no process ends long after the others.
    finish(list(reversed(trainings.values())), jobs, None)
    samples, scores = 0.0, {}
    for name, training in trainings.items():
        train = training.metrics()["train"]
        samples += train["samples_per_second"] * train["seconds"]
        scores[name] = read_scores(scores_file(training.folder, "test"))
    return scores, round(samples)


def walk_all(recipe: Path, folder: Path, names: list[str], arguments: tuple[str, ...]) -> None:
    """Walk with and without content side by side; keep the run at half of the way."""
    middle = names[len(names) // 2 - 1].partition("=")[2]

    def with_content() -> None:
        half = folder / "runs" / "half"
        if not half.exists():
            run = walk(recipe, folder, "continual", *arguments, "--until", middle)
            shutil.copytree(run, half.with_name(".half"), dirs_exist_ok=True)
            half.with_name(".half").rename(half)
        walk(recipe, folder, "continual", *arguments)

    with ThreadPoolExecutor(2) as pool:
        futures: list[Future[Any]] = [
            pool.submit(with_content),
            pool.submit(walk, recipe, folder, "id_only", *arguments, *WITHOUT_CONTENT),
        ]
    for future in futures:
        future.result()


HISTORY = 50


def write_log(folder: Path, partitions: int, source: Path | None, rows: int | None) -> list[str]:
    """Write `folder/data` unless it is there; return the names of its partitions, in order.

    `source` is MovieLens (None: the bundled sample), `rows` a number of ratings (None: all).
    """
    names = [f"part={number + 1:02}" for number in range(partitions)]
    data, prepared = folder / "data", folder / "movielens"
    if data.exists():
        return names
    if not prepared.exists():
        prepare_movielens(source, prepared, HISTORY)
    tables = [pq.read_table(prepared / split) for split in ("train", "valid", "test")]
    log = pa.concat_tables(tables)
    order = np.argsort(log["timestamp"].to_numpy(), kind="stable")
    log = log.take(order)[:rows]
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name, row_indices in zip(names, np.array_split(np.arange(log.num_rows), partitions)):
        (partial / "train" / name).mkdir(parents=True)
        chunk = log.slice(int(row_indices[0]), len(row_indices))
        pq.write_table(chunk, partial / "train" / name / "part-0.parquet", row_group_size=2048)
    shutil.copytree(prepared / "items", partial / "items")
    shutil.copy(prepared / "schema.yaml", partial)
    partial.rename(data)
    return names


def view_before(folder: Path, names: list[str], number: int) -> Path:
    """Return a dataset of the partitions before one, which is its validation and test split."""
    data, view = folder / "data", folder / "views" / names[number]
    if view.exists():
        return view
    partial = view.with_name(f".{view.name}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "train").mkdir(parents=True)
    for name in names[:number]:
        (partial / "train" / name).symlink_to(data.absolute() / "train" / name)
    for split in ("valid", "test"):
        (partial / split).symlink_to(data.absolute() / "train" / names[number])
    (partial / "items").symlink_to(data.absolute() / "items")
    shutil.copy(data / "schema.yaml", partial)
    partial.rename(view)
    return view


def rows_trained(folder: Path, names: list[str], number: int, first_passes: list[int]) -> int:
    """Return the rows that a walk trains on in the first partitions, once for each pass."""
    settings = ContinualSettings(first_passes=first_passes)
    return sum(
        num_passes(settings, index, from_nothing=True)
        * pq.read_table(folder / "data" / "train" / name).num_rows
        for index, name in enumerate(names[:number])
    )


def days_of(folder: Path, name: str) -> float:
    """Return the number of days that a partition spans."""
    times = pq.read_table(folder / "data" / "train" / name, columns=["timestamp"])["timestamp"]
    bounds = pc.min_max(times.cast(pa.int64())).as_py()
    return float(bounds["max"] - bounds["min"]) / 86_400


RECIPE = Path(__file__).parents[1] / "settings" / "a.yaml"
MODALITIES = "{text: {kind: feature, column: text}}"


@dataclass(frozen=True)
class Arrival:
    """Seconds of a partition: median by phase, and `plain` for the same rows in a plain epoch."""

    rows: int
    phases: dict[str, float]
    plain: float

    @property
    def total(self) -> float:
        return self.phases["total"]


def measure_arrival(out: Path, rows: int, partitions: int = 4, device: Device = "cpu") -> Arrival:
    """Time partitions of so many rows, after two that warm up, and one plain epoch over all."""
    folder = out / f"arrival-{rows}"
    _write(folder, rows, partitions)
    arguments = ("--content.modalities", MODALITIES, "--device", device)
    run = walk(RECIPE, folder, "walk", *arguments)
    lines = [json.loads(line) for line in (run / "seconds.jsonl").read_text().splitlines()]
    timed_lines = lines[2:] or lines[-1:]
    names = [name for name in timed_lines[-1] if name not in ("partition", "rows")]
    phases = {name: median(line[name] for line in timed_lines) for name in names}
    plain = _plain_epoch(folder, arguments)
    return Arrival(rows, phases, plain["seconds"] / partitions)


def _write(folder: Path, rows: int, partitions: int) -> None:
    data = folder / "data"
    if (data / "train" / f"part={partitions - 1}").exists():
        return
    write_dataset(data, DatasetSize(rows * partitions, 20_000, 50_000, image_dim=0))
    table = pq.read_table(data / "train")
    for file in (data / "train").glob("*.parquet"):
        file.unlink()
    for number in range(partitions):
        partition = data / "train" / f"part={number}"
        partition.mkdir(parents=True)
        chunk = table.slice(rows * number, rows)
        pq.write_table(chunk, partition / "part-0.parquet", row_group_size=32_768)


def _plain_epoch(folder: Path, arguments: tuple[str, ...]) -> dict[str, Any]:
    run, log = folder / "runs" / "plain", folder / "runs" / "plain.log"
    command = [sys.executable, "-m", "recsys.cli", "train", "--config", str(RECIPE)]
    command += ["--data", str(folder / "data"), "--out", str(run), "--epochs", "1", *arguments]
    with log.open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, stdout=output, stderr=output, env=environment)
    if process.returncode:
        raise RuntimeError(f"the plain epoch failed; see {log}")
    report: dict[str, Any] = json.loads((run / "metrics.json").read_text())["train"]
    return report
