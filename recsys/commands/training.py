"""Commands with the settings of a run: train, continual, search, cache and describe."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from recsys.commands.options import require_finished, require_schema
from recsys.config import Config, Resume
from recsys.doctor import require_working_installation, without_garbage_collection
from recsys.extras import require_extra

if TYPE_CHECKING:
    from recsys.search.search import Search

NUM_TRIALS_SHOWN = 10


def train(
    config: Config,
    data: str,
    out: Path | None = None,
    dry_run: bool = False,
    compare: Literal["id_only"] | None = None,
    resume: Resume = "auto",
    overwrite: bool = False,
    warm_start: Path | None = None,
    warm_start_checkpoint: Literal["best", "last"] = "best",
    warm_start_only: list[str] | None = None,
    warm_start_skip: list[str] | None = None,
    warm_start_optimizer: bool = True,
) -> int:
    """Train a model, or try it with `--dry-run`; return the exit code. A collective.

    Args:
        config: the settings.
        data: dataset: folder or URL
        out: folder of the run to write
        dry_run: build the model and take one step; needs no --out and writes nothing
        compare: id_only: train the same model without content, too, and compare both
        resume: auto: continue from the run's last checkpoint if there is one; never; must
        overwrite: replace an earlier run
        warm_start: finished run whose state the new run starts from, on other data
        warm_start_checkpoint: its best model or its last checkpoint
        warm_start_only: load only parameters that match these patterns, such as 'content.*'
        warm_start_skip: reinitialise parameters that match these patterns
        warm_start_optimizer: load the state of the optimizers, too
    """
    if not dry_run and out is None:
        raise ValueError("train needs --out, the folder of the run to write (or --dry-run)")
    if warm_start is not None and compare:
        raise ValueError("--warm-start starts one run: leave out --compare")
    require_schema(data)
    require_working_installation()
    with without_garbage_collection():
        from recsys.checkpoint.partitions import newest_run
        from recsys.checkpoint.warm_start.source import WarmStart
        from recsys.distributed.lockstep import TrainingStopped
        from recsys.distributed.ranks import joined_ranks
        from recsys.training.dry_run import dry_run as try_one_step
        from recsys.training.train import id_only_baseline
        from recsys.training.train import train as train_run

    selection = WarmStart(
        Path(),
        checkpoint=warm_start_checkpoint,
        only=tuple(warm_start_only or ()),
        skip=tuple(warm_start_skip or ()),
        optimizer=warm_start_optimizer,
    )
    if warm_start is None and selection != WarmStart(Path()):
        raise ValueError("--warm-start-* select state of a run; add --warm-start RUN")
    baseline = None if compare is None else id_only_baseline(config)
    try:
        with joined_ranks(config.device) as ranks:
            source = None if warm_start is None else replace(selection, run=newest_run(warm_start))
            if dry_run:
                for variant in [config] if baseline is None else [config, baseline]:
                    try_one_step(variant, data, ranks, source)
                return 0
            assert out is not None
            train_run(config, data, out, ranks, overwrite, resume, source, baseline)
    except TrainingStopped as stopped:
        _on_first_rank(str(stopped))
        return 128 + signal.SIGTERM
    return 0


def continual(
    config: Config,
    data: str,
    out: Path,
    from_: str | None = None,
    until: str | None = None,
    follow: bool = False,
    warm_start: Path | None = None,
) -> int:
    """Train on partitions in time order, each scored before; return the exit code. A collective.

    Args:
        config: the settings.
        data: dataset: folder or URL
        out: folder of the continual run
        from_: value of the first partition, such as 2026-11-01 or 2026-11-01/05
        until: value of the last partition
        follow: wait for the next partition (its _SUCCESS, or continual.quiet_seconds) until SIGTERM
        warm_start: finished run whose state the first partition starts from
    """
    require_schema(data)
    if warm_start is not None:
        warm_start = require_finished(warm_start)
    require_working_installation()
    from recsys.checkpoint.warm_start.source import WarmStart
    from recsys.distributed.lockstep import TrainingStopped
    from recsys.distributed.ranks import joined_ranks
    from recsys.training.continual.partitions import PartitionRange
    from recsys.training.continual.walk import train_continually

    source = None if warm_start is None else WarmStart(warm_start)
    span = PartitionRange(from_, until)
    try:
        with joined_ranks(config.device) as ranks:
            train_continually(config, data, out, ranks, span, follow, source)
    except TrainingStopped:
        _on_first_rank(f"asked to end; {out} has the state, and the same command continues from it")
        return 0 if follow else 128 + signal.SIGTERM
    return 0


def search(
    config: Config,
    data: list[str],
    space: Path,
    out: Path,
    trials: PositiveInt,
    jobs: PositiveInt = 1,
    seeds: PositiveInt = 1,
    nproc: PositiveInt = 1,
    sampler: Literal["tpe", "random", "grid"] = "tpe",
    prune: bool = True,
    keep_checkpoints: Literal["best", "all"] = "best",
) -> int:
    """Search, and print the best trials; return the exit code.

    Args:
        config: the settings.
        data: datasets: folders or URLs; a trial's value is the mean over them
        space: YAML file of settings and their values
        out: folder of the search
        trials: number of trials, including those of earlier commands on the folder
        jobs: trials that run at the same time
        seeds: runs of each trial and dataset
        nproc: ranks of each run
        sampler: rule that proposes values: tpe learns from earlier trials, grid tries all
        prune: stop trials that are worse than the median of others at the same validation
        keep_checkpoints: trials whose checkpoints are kept
    """
    for dataset in data:
        require_schema(dataset)
    require_working_installation()
    require_extra("search", "recsys search", "optuna")
    from recsys.search.search import Search, SearchStopped
    from recsys.search.space import read_space

    study = Search(
        config,
        read_space(space),
        data,
        out,
        num_trials=trials,
        jobs=jobs,
        seeds=seeds,
        nproc=nproc,
        sampler=sampler,
        prunes=prune,
        keep_checkpoints=keep_checkpoints,
    )
    try:
        study.run()
    except SearchStopped:
        sys.stderr.write(f"asked to end; the same command continues with {out}\n")
        return 128 + signal.SIGTERM
    _print_best_trials(study)
    return 0


def _print_best_trials(study: Search) -> None:
    from embeddings.plan_text import align_columns
    from recsys.distributed.log import print_table
    from recsys.evaluation.model_selection import selection_text
    from recsys.search.search import BEST

    names = [parameter.name for parameter in study.space]
    rows = [["trial", selection_text(study.config.best_model_by), *names]]
    for trial in study.ranking()[:NUM_TRIALS_SHOWN]:
        values = [str(trial.params[name]) for name in names]
        rows.append([str(trial.number), f"{abs(trial.values[0]):.4f}", *values])
    print_table(align_columns(rows))
    if len(rows) > 1:
        command = f"recsys train --config {study.out / BEST} --data {study.data[0]}"
        print_table(f"\n{command} --out RUN")


def cache(config: Config, data: str) -> None:
    """Fill the caches of item content. A collective.

    Args:
        config: the settings.
        data: dataset: folder or URL
    """
    require_schema(data)
    require_working_installation()
    from recsys.content.build import fill_caches
    from recsys.distributed.ranks import joined_ranks

    with joined_ranks(config.device) as ranks:
        fill_caches(config, data, ranks)


def describe(
    config: Config,
    data: str,
    device: str = "auto",
    nodes: int = 1,
    gpus_per_node: int | None = None,
    rows: list[str] | None = None,
    memory_bytes: float | None = None,
    json: Path | None = None,
) -> None:
    """Print the plan of a run on a cluster.

    Args:
        config: the settings.
        data: dataset: folder or URL
        device: a100, h100, h200 or b200, present or not; auto, cpu or cuda: that of this machine
        nodes: machines
        gpus_per_node: ranks of each machine; default: the GPUs of this machine, or 1
        rows: TABLE=NUMBER: other numbers of rows than in schema.yaml
        memory_bytes: memory of each device, such as 4e10; default: that of the device
        json: file to write the numbers to
    """
    require_schema(data)
    require_working_installation()
    from embeddings.simulated_cluster import DEVICES
    from recsys.diagnostics.plan.report import describe_run, find_cluster, parse_rows

    config.device = "cuda" if device in DEVICES else device  # type: ignore[assignment]
    cluster = find_cluster(device, nodes, gpus_per_node, memory_bytes)
    describe_run(config, data, cluster, parse_rows(rows or []), json)


def _on_first_rank(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{text}\n")
