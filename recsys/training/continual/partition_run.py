"""Trains on one partition: a run of its own that begins with the state of the one before."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recsys.build import Job, build_job
from recsys.checkpoint.cold_row_init import refill_cold_rows
from recsys.checkpoint.files import folders_by_age, model_of
from recsys.checkpoint.item_counts import counts_before
from recsys.checkpoint.manager import Checkpoints
from recsys.checkpoint.partitions import ContinualFolder, RunState, TrainedPartition
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_folder import (
    METRICS,
    begin_run,
    check_encoders,
    describe_run,
    finish_run,
    read_item_counts,
    recover_checkpoints,
)
from recsys.checkpoint.run_schema import PARTITION, schema_of_data
from recsys.checkpoint.warm_start.plan import WarmStartPlan, plan_warm_start
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import Config, ContinualSettings, content_settings
from recsys.data.interactions import Interactions
from recsys.data.item_frequency import ItemCounts
from recsys.data.schema import Schema
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.evaluation.evaluate import check_data, fill_bank
from recsys.evaluation.scores import write_scores
from recsys.storage.files import write_whole
from recsys.storage.location import Location
from recsys.training.continual.changes import (
    NewIds,
    add_ids,
    check_items,
    new_schema,
    require_unchanged,
)
from recsys.training.continual.partitions import Partition, is_late
from recsys.training.continual.scoring import (
    format_lines,
    record_metrics,
    score_partition,
    track,
)
from recsys.training.initial_state import (
    OpenedWarmStart,
    describe_start,
    fit_to_rows,
    open_warm_start,
    start_fresh,
    take_over,
)
from recsys.training.trackers import Reporter
from recsys.training.train import training_figures, training_interactions
from recsys.training.trainer import Trainer

logger = logging.getLogger(__name__)


class PhaseTimer:
    """Seconds of the phases of a partition, for the log and `RUN/seconds.jsonl`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase: the time since the last call belongs to it."""
        timestamp = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + timestamp - self._since
        self._since = timestamp

    def append(self, file: Path, partition: str, rows: int) -> None:
        """Add a line with the seconds of a partition to a file."""
        total = sum(self.seconds.values())
        line = {"partition": partition, "rows": rows, **self.seconds, "total": total}
        with file.open("a") as opened:
            opened.write(json.dumps(line) + "\n")

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({phases})"


@dataclass(frozen=True)
class ContinualRun:
    """Settings, folders and ranks that the runs of all partitions share."""

    config: Config
    data: str
    folder: ContinualFolder
    ranks: Ranks
    lockstep: Lockstep  # keeps the ranks on the same batch, and learns of requests to end
    writers: Ranks  # the same ranks with a group for checkpoints
    warm_start: WarmStart | None = None  # the run that the first partition's begins from
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def before(self, state: RunState) -> tuple[str, WarmStart | None]:
        """Return the partition trained on last, and what the next run begins from."""
        if (last := state.last) is None:
            return "", self.warm_start
        return last.name, WarmStart(self.folder.run_of(last.name), checkpoint="last")


@dataclass(frozen=True)
class Start:
    """The initial state of a partition's run."""

    warm: OpenedWarmStart | None  # with this run's state; None: from nothing
    ids: NewIds  # that are new in the partition's rows, and have rows once these are scored


def train_partition(
    continual: ContinualRun, partition: Partition, state: RunState
) -> TrainedPartition:
    """Score a partition and train on it, or go on with that. A collective.

    Raises:
        TrainingStopped: the job was asked to end; its state is saved.
        ValueError: on every rank: a row cannot be used, or data or settings define another model.
    """
    run, ranks = continual.folder.run_of(partition.name), continual.ranks
    continual.timer.start()
    config, (_, request) = config_of_partition(continual.config, state), continual.before(state)
    with ranks.raise_on_all_ranks():
        if request is not None and not (request.run / "config.yaml").is_file():
            raise ValueError(
                f"{request.run}: has not the model that train/{partition.name} goes on from; "
                "bring it back, or start a new run in another --out"
            )
        if ranks.is_first:
            recover_checkpoints(run)
    goes_on = ranks.from_first(bool(folders_by_age(run / "checkpoints")))
    schema, start = _schema(continual, partition, state, config, goes_on)
    continual.timer.lap("read")
    job = build_job(config, continual.data, ranks, schema, partition.folder)
    continual.timer.lap("build")
    trainer, line = open_partition(continual, partition, state, job, start)
    try:
        if line is not None:
            track(trainer.reporter, line)
        continual.timer.lap("begin")
        trainer.train()
        continual.timer.lap("train")
        _finish(trainer, partition)
    finally:
        trainer.reporter.close()
        trainer.checkpoints.close()
    continual.timer.lap("finish")
    return _as_read(partition, trainer.interactions)


def _schema(
    continual: ContinualRun, partition: Partition, state: RunState, config: Config, goes_on: bool
) -> tuple[Schema, Start | None]:
    """Return the columns with their maps of ids, and how to start, if anew. A collective."""
    run, ranks = continual.folder.run_of(partition.name), continual.ranks
    root = Location.of(continual.data)
    if goes_on:
        with ranks.raise_on_all_ranks():
            return schema_of_data(run, root, ranks, goes_on), None
    _, request = continual.before(state)
    if request is None:
        schema, ids = new_schema(root, partition, None, ranks)
        return schema, Start(None, ids)
    warm, schema = open_warm_start(request, continual.data, run, ranks, with_vocabularies=False)
    if state.last is not None:
        with ranks.raise_on_all_ranks():
            require_unchanged(*warm, config, root)
    schema, ids = new_schema(root, partition, (schema, warm[0].schema), ranks)
    return schema, Start(warm, ids)


def open_partition(
    continual: ContinualRun,
    partition: Partition,
    state: RunState,
    job: Job,
    start: Start | None,
) -> tuple[Trainer, dict[str, Any] | None]:
    """Return the trainer of a new or restored run, and the line of metrics. A collective."""
    folder, ranks = continual.folder, continual.ranks
    run = folder.run_of(partition.name)
    interactions = training_interactions(job, job.config.continual.order == "shuffled")
    current = _as_read(partition, interactions)
    with ranks.raise_on_all_ranks():
        _refuse_changed(folder, state, current, start is None)
        _refuse_copy(state, current)
    checkpoints = Checkpoints(job, run, current.fingerprint, continual.writers)
    if start is None:
        check_encoders(run, job)
        progress = checkpoints.restore()
        assert progress is not None  # a checkpoint was seen
    else:
        progress = _begin(continual, current, state, job, start)
    line = _record(continual, partition, state)
    item_counts = read_item_counts(run, job.schema.item_id_limit)
    reporter = Reporter(job, folder.path, progress, counts_all_steps=True)
    parts = interactions, checkpoints, continual.lockstep, reporter, progress, item_counts
    return PartitionTrainer(job, run, *parts), line


def _as_read(partition: Partition, interactions: Interactions) -> TrainedPartition:
    rows = interactions.rows
    return TrainedPartition(partition.name, rows.num_rows, rows.fingerprint())


def _refuse_changed(
    folder: ContinualFolder, state: RunState, current: TrainedPartition, goes_on: bool
) -> None:
    previous = state.begun
    if (
        previous is None
        or previous == current
        or not (goes_on or folder.scores_of(current.name).exists())
    ):
        return
    raise ValueError(
        f"train/{current.name}: has changed since it was scored (then {previous.rows:,} rows, now "
        f"{current.rows:,}; {previous.fingerprint} and {current.fingerprint}); bring it back, or "
        "start a new run in another --out"
    )


def _refuse_copy(state: RunState, current: TrainedPartition) -> None:
    """Refuse the rows of a trained partition under another name, whose scores would know them."""
    for trained in state.trained:
        has_digest = "-" in current.fingerprint  # of the content, not of names and sizes alone
        if has_digest and trained.fingerprint == current.fingerprint:
            raise ValueError(
                f"train/{current.name}: has the {current.rows:,} rows of {trained.name}, which is "
                "trained on; rename it back, or remove the copy"
            )


def _begin(
    continual: ContinualRun, current: TrainedPartition, state: RunState, job: Job, start: Start
) -> Progress:
    """Begin the run of a partition, whose rows are scored if a model can. A collective."""
    folder, ranks, plan = continual.folder, continual.ranks, None
    run = folder.run_of(current.name)
    begun_state, counts = replace(state, begun=current), ItemCounts.sum_of([])
    if start.warm is not None:
        plan = plan_warm_start(job, *start.warm)
        plan.take_unused_rows(job)
        check_items(job, plan)
        progress = take_over(job, plan)
        counts = counts_before(job, plan)
        continual.timer.lap("warm start")
        if is_late(current.name, state):
            logger.info("%s: late, so it is trained on without scores", current.name)
        else:
            _write_scores(continual, begun_state, job, counts, plan)
        continual.timer.lap("score")
    add_ids(job.schema, start.ids, ranks)
    checked = check_data(job, ("train",))
    if plan is None:
        progress = start_fresh(job, checked)
    else:
        earlier = [Partition(trained.name).folder for trained in state.trained]
        fit_to_rows(job, plan, checked.numbers, earlier)
    continual.timer.lap("fit")
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            folder.write(begun_state)
    # Dropout and negatives differ by partition, and are the same at every start.
    torch.manual_seed(job.config.seed + 1 + ranks.rank + 1000003 * progress.age)
    begin_run(run, job, ItemCounts.sum_of([counts, checked.item_counts]), checked.skipped)
    describe_run(run, job, continual.data)
    if plan is not None:
        describe_start(run, ranks, plan)
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            write_whole(run / PARTITION, json.dumps({"name": current.name}) + "\n")
    return progress


def _write_scores(
    continual: ContinualRun,
    begun_state: RunState,
    job: Job,
    counts: ItemCounts,
    plan: WarmStartPlan,
) -> None:
    """Score the partition that is begun, unless its scores are written. A collective."""
    folder, ranks, before = continual.folder, continual.ranks, plan.source.request.run
    assert begun_state.begun is not None
    file, model = folder.scores_of(begun_state.begun.name), model_of(before)
    are_written = ranks.from_first(file.exists())
    if are_written and job.em3.neighbours is None:  # otherwise the blend is fitted again
        return
    with job.averaged():
        scores = score_partition(job, counts, continual.lockstep)
    with ranks.raise_on_all_ranks():
        if scores is not None and not are_written:
            folder.write(
                begun_state
            )  # before the scores, so that they are known to be of these rows
            file.parent.mkdir(parents=True, exist_ok=True)
            write_scores(scores, file, model)


def _record(
    continual: ContinualRun, partition: Partition, state: RunState
) -> dict[str, Any] | None:
    """Write and print the metrics of the partition, once; return them on rank 0. A collective."""
    folder, ranks, line = continual.folder, continual.ranks, None
    with ranks.raise_on_all_ranks():
        if ranks.is_first and folder.scores_of(partition.name).exists():
            metrics, model_name = continual.config.metrics, continual.before(state)[0]
            line = record_metrics(metrics, folder, partition, model_name)
            if line is not None:
                print_table(format_lines(continual.config.ranking, [line]))
    return line


class PartitionTrainer(Trainer):
    """Trains without validation: the next partition's scores tell how good the model is."""

    def _checkpoint_is_due(self, first_step: int, end_of_part: int) -> bool:
        return self._is_due_by_steps(first_step)

    def _validate(self) -> None:
        """At the end of a pass fill rows without training and, if asked, the bank. A collective."""
        content = content_settings(self.job.config.content)
        if content is not None and content.history.refresh_bank_every_epoch:
            fill_bank(self.job, self.lockstep)
        with self.job.averaged():
            refill_cold_rows(self.job)


def passes_over(settings: ContinualSettings, number: int, from_nothing: bool) -> int:
    """Return the passes over the rows of the `number`-th partition, from 0.

    A model that begins `from_nothing` gains from seeing its first partitions again.
    """
    first = settings.first_passes if from_nothing else []
    return first[number] if number < len(first) else settings.passes


def config_of_partition(config: Config, state: RunState) -> Config:
    """Return the settings of the next partition's run; learning rates warm up once."""
    number, from_nothing = len(state.trained), state.warm_start is None
    warmup = config.optimizer.warmup_steps if number == 0 and from_nothing else 0
    return replace(
        config,
        epochs=passes_over(config.continual, number, from_nothing),
        validations_per_epoch=1,
        optimizer=replace(config.optimizer, warmup_steps=warmup),
    )


def _finish(trainer: Trainer, partition: Partition) -> None:
    """Keep the model, with averaged weights if there are any, and describe it. A collective."""
    job, progress = trainer.job, trainer.progress
    with job.averaged():
        trainer.checkpoints.save_best(progress)
    metrics = {"partition": partition.name, **training_figures(progress, job.ranks)}
    with job.ranks.raise_on_all_ranks():
        if job.ranks.is_first:
            write_whole(trainer.run / METRICS, json.dumps(metrics, indent=2) + "\n")
    finish_run(trainer.run, job.ranks)
