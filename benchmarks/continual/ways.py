"""Ways to keep a model up to date: each scores every partition before it has seen it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.continual.log import view_before
from benchmarks.quality.runs import Training, finish
from recsys.checkpoint.partitions.state import ContinualFolder, newest_run
from recsys.data.item_frequency import ItemCounts
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import score, split_interactions, split_scores
from recsys.evaluation.predict import load_run
from recsys.evaluation.scores import SplitScores, read_scores, scores_file

CONTINUAL, RETRAINED = "continual", "retrained from scratch"
FROZEN, ID_ONLY = "frozen after the first half", "ID-only continual"
WAYS = (CONTINUAL, RETRAINED, FROZEN, ID_ONLY)
WITHOUT_CONTENT = ("--content", "none", "--contrastive.weight", "0")
Scores = dict[str, SplitScores]


def walk(recipe: Path, folder: Path, name: str, *words: str) -> Path:
    """Run `recsys continual` over `folder/data` in a process of one thread; return its folder.

    Raises:
        RuntimeError: it failed; names its log.
    """
    run, log = folder / "runs" / name, folder / "runs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recsys.cli", "continual", "--config", str(recipe)]
    command += ["--data", str(folder / "data"), "--out", str(run), *words]
    with log.open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed; see {log}")
    return run


def scores_of_walk(run: Path, names: list[str]) -> Scores:
    """Return the scores that a walk has made of its partitions."""
    folder = ContinualFolder(run)
    return {name: read_scores(folder.scores_of(name)) for name in names[1:]}


def frozen_at(run: Path, names: list[str], known: Scores) -> Scores:
    """Score the second half by the model that a walk over the first half has left.

    Args:
        run: the walk over the first half.
        names: all partitions.
        known: scores of the walk that goes on, whose counts say which items are cold.
    """
    found = {}
    with joined_ranks("cpu") as ranks:
        job = load_run(newest_run(run), None, ranks, "cpu")
        for name in names[len(names) // 2 :]:
            job.train_folder = f"train/{name}"
            scored = score(job, split_interactions(job, "train"))
            scores = split_scores(job.schema, scored, ItemCounts.sum_of([]))
            found[name] = replace(scores, counts=known[name].counts)
    return found


def retrain(
    recipe: Path, folder: Path, names: list[str], first: int, words: tuple[str, ...], jobs: int
) -> tuple[Scores, int]:
    """Train from scratch on all partitions before each; return the scores and the rows trained on.

    The best of its epochs is chosen on the partition itself, which is in its favour.
    """
    trainings = {}
    for number in range(first, len(names)):
        data = str(view_before(folder, names, number))
        run = folder / "runs" / f"retrained-{names[number]}"
        title = f"{RETRAINED}, {names[number]}"
        trainings[names[number]] = Training(run, data, recipe, 0, words, title)
    # The largest first, so that no process ends long after the others.
    finish(list(reversed(trainings.values())), jobs, None)
    samples, found = 0.0, {}
    for name, training in trainings.items():
        train = training.metrics()["train"]
        samples += train["samples_per_second"] * train["seconds"]
        found[name] = read_scores(scores_file(training.folder, "test"))
    return found, round(samples)


def walk_all(recipe: Path, folder: Path, names: list[str], words: tuple[str, ...]) -> None:
    """Walk with and without content side by side; keep the run at half of the way."""
    middle = names[len(names) // 2 - 1].partition("=")[2]

    def with_content() -> None:
        half = folder / "runs" / "half"
        if not half.exists():
            run = walk(recipe, folder, "continual", *words, "--until", middle)
            shutil.copytree(run, half.with_name(".half"), dirs_exist_ok=True)
            half.with_name(".half").rename(half)
        walk(recipe, folder, "continual", *words)

    with ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(with_content),
            pool.submit(walk, recipe, folder, "id_only", *words, *WITHOUT_CONTENT),
        ]
    for each in done:
        each.result()
