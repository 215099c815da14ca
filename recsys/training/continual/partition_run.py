"""Trains on one partition: a run of its own that begins with the state of the one before.

It is stopped, killed and continued as any run. Before its first step the partition is scored
(`scoring`), and nothing is written before all of its rows have been read without a fault.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from typing import Any

from recsys.build import Job, build_job
from recsys.checkpoint.compatibility import with_automatic
from recsys.checkpoint.files import folders_by_age, model_of
from recsys.checkpoint.manager import Checkpoints
from recsys.checkpoint.new_rows.fill import fill_rows_of_later_items
from recsys.checkpoint.new_rows.trained_counts import counts_before
from recsys.checkpoint.partitions.state import ContinualFolder, RunState, Trained
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_folder import (
    begin_run,
    check_encoders,
    describe_run,
    read_item_counts,
    recover_checkpoints,
)
from recsys.checkpoint.run_schema import PARTITION, schema_of_data
from recsys.checkpoint.warm_start.plan import WarmStartPlan, plan_warm_start
from recsys.checkpoint.warm_start.request import WarmStart
from recsys.config import Config, load_config
from recsys.data.filesystem import Location, write_whole
from recsys.data.interactions import Interactions
from recsys.data.item_frequency import ItemCounts
from recsys.data.schema import Schema
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.evaluation.evaluate import check_data
from recsys.evaluation.scores import write_scores
from recsys.training.continual.changes import (
    NewIds,
    add_ids,
    check_items,
    new_schema,
    require_unchanged,
)
from recsys.training.continual.clock import Clock
from recsys.training.continual.partition_trainer import (
    PartitionTrainer,
    config_of_partition,
    finish,
)
from recsys.training.continual.partitions import Partition
from recsys.training.continual.queue import is_late
from recsys.training.continual.scoring import (
    format_lines,
    record_metrics,
    reseed,
    score_partition,
    track,
)
from recsys.training.reporter import Reporter
from recsys.training.train import start_fresh, training_interactions
from recsys.training.trainer import Trainer
from recsys.training.warm_start import (
    OpenedWarmStart,
    describe_start,
    fit_to_rows,
    open_warm_start,
    take_over,
)

logger = logging.getLogger(__name__)


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
    clock: Clock = field(default_factory=Clock)  # of the phases of a partition

    def before(self, state: RunState) -> tuple[str, WarmStart | None]:
        """Return the partition trained on last, and what the next run begins from."""
        if (last := state.last) is None:
            return "", self.warm_start
        return last.name, WarmStart(self.folder.run_of(last.name), checkpoint="last")


@dataclass(frozen=True)
class Start:
    """How the run of a partition begins."""

    warm: OpenedWarmStart | None  # with this run's state; None: from nothing
    ids: NewIds  # that are new in the partition's rows, and have rows once these are scored


def train_partition(continual: ContinualRun, partition: Partition, state: RunState) -> Trained:
    """Score a partition and train on it, or go on with that. A collective.

    Raises:
        TrainingStopped: the job was asked to end; its state is saved.
        ValueError: on every rank: a row cannot be used, or data or settings are not those that the
            partitions before were trained with.
    """
    run, ranks = continual.folder.run_of(partition.name), continual.ranks
    continual.clock.start()
    config, (_, request) = config_of_partition(continual.config, state), continual.before(state)
    with ranks.raise_on_all_ranks():
        if request is not None:
            if not (request.run / "config.yaml").is_file():
                raise ValueError(
                    f"{request.run}: has not the model that train/{partition.name} goes on from; "
                    "bring it back, or walk anew to another --out"
                )
            config = with_automatic(config, load_config(request.run / "config.yaml"))
        if ranks.is_first:
            recover_checkpoints(run)
    goes_on = ranks.from_first(bool(folders_by_age(run / "checkpoints")))
    schema, start = _schema(continual, partition, state, config, goes_on)
    continual.clock.lap("read")
    job = build_job(config, continual.data, ranks, schema, partition.folder)
    continual.clock.lap("build")
    trainer, line = open_partition(continual, partition, state, job, start)
    try:
        if line is not None:
            track(trainer.reporter, line)
        continual.clock.lap("begin")
        trainer.train()
        continual.clock.lap("train")
        finish(trainer, partition)
    finally:
        trainer.reporter.close()
        trainer.checkpoints.close()
    continual.clock.lap("finish")
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
    """Score the partition and begin its run, or restore the state it has. A collective.

    Args:
        continual: what the runs of all partitions share.
        partition: the next one.
        state: what the run has done.
        job: the job of the partition.
        start: how its run begins; None: it goes on.

    Returns:
        the trainer, and the new line of metrics, on rank 0 if there is one.
    """
    folder, ranks = continual.folder, continual.ranks
    run = folder.run_of(partition.name)
    interactions = training_interactions(job, job.config.continual.order == "shuffled")
    now = _as_read(partition, interactions)
    with ranks.raise_on_all_ranks():
        _refuse_changed(folder, state, now, start is None)
        _refuse_copy(state, now)
    checkpoints = Checkpoints(job, run, now.fingerprint, continual.writers)
    if start is None:
        check_encoders(run, job)
        progress = checkpoints.restore()
        assert progress is not None  # a checkpoint was seen
    else:
        progress = _begin(continual, now, state, job, start)
    line = _record(continual, partition, state)
    item_counts = read_item_counts(run, job.schema.item_id_limit)
    reporter = Reporter(job, folder.path, progress, counts_all_steps=True)
    parts = interactions, checkpoints, continual.lockstep, reporter, progress, item_counts
    return PartitionTrainer(job, run, *parts), line


def _as_read(partition: Partition, interactions: Interactions) -> Trained:
    rows = interactions.rows
    return Trained(partition.name, rows.num_rows, rows.fingerprint())


def _refuse_changed(folder: ContinualFolder, state: RunState, now: Trained, goes_on: bool) -> None:
    """Refuse a partition that has changed since it was begun."""
    begun = state.begun
    if begun is None or begun == now or not (goes_on or folder.scores_of(now.name).exists()):
        return
    raise ValueError(
        f"train/{now.name}: has changed since it was scored (then {begun.rows:,} rows, now "
        f"{now.rows:,}; {begun.fingerprint} and {now.fingerprint}); bring it back, or walk anew to "
        "another --out"
    )


def _refuse_copy(state: RunState, now: Trained) -> None:
    """Refuse the rows of a trained partition under another name, whose scores would know them."""
    for trained in state.trained:
        has_digest = "-" in now.fingerprint  # of the content, not of names and sizes alone
        if has_digest and trained.fingerprint == now.fingerprint:
            raise ValueError(
                f"train/{now.name}: has the {now.rows:,} rows of {trained.name}, which is trained "
                "on; rename it back, or remove the copy"
            )


def _begin(
    continual: ContinualRun, now: Trained, state: RunState, job: Job, start: Start
) -> Progress:
    """Begin the run of a partition, whose rows are scored if a model can. A collective.

    What is fitted to its rows is fitted behind the scores.
    """
    folder, ranks, plan = continual.folder, continual.ranks, None
    run = folder.run_of(now.name)
    begun, known = replace(state, begun=now), ItemCounts.sum_of([])
    if start.warm is not None:
        plan = plan_warm_start(job, *start.warm)
        plan.take_unused_rows(job)
        check_items(job, plan)
        progress = take_over(job, plan)
        known = counts_before(job, plan)
        continual.clock.lap("warm start")
        if is_late(now.name, state):
            logger.info("%s: late, so it is trained on without scores", now.name)
        else:
            _write_scores(continual, begun, job, known, plan)
        continual.clock.lap("score")
    add_ids(job.schema, start.ids, ranks)
    checked = check_data(job, ("train",))
    if plan is None:
        progress = start_fresh(job, checked)
    else:
        fit_to_rows(job, plan, checked.numbers)
    continual.clock.lap("fit")
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            folder.write(begun)
    reseed(job, progress.age)
    begin_run(run, job, ItemCounts.sum_of([known, checked.item_counts]), checked.skipped)
    describe_run(run, job, continual.data)
    if plan is not None:
        describe_start(run, ranks, plan)
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            write_whole(run / PARTITION, json.dumps({"name": now.name}) + "\n")
    return progress


def _write_scores(
    continual: ContinualRun, begun: RunState, job: Job, known: ItemCounts, plan: WarmStartPlan
) -> None:
    """Score the partition that is begun, unless its scores are written. A collective.

    The model is that of the run before, as `recsys predict` loads it.
    """
    folder, ranks, before = continual.folder, continual.ranks, plan.source.request.run
    assert begun.begun is not None
    file, model = folder.scores_of(begun.begun.name), model_of(before)
    if ranks.from_first(file.exists()):
        return
    with job.averaged():
        if plan.maps.get(job.schema.target_item) is not None:
            fill_rows_of_later_items(job, before)
        scores = score_partition(job, known, continual.lockstep)
    with ranks.raise_on_all_ranks():
        if scores is not None:
            folder.write(begun)  # before the scores, so that they are known to be of these rows
            file.parent.mkdir(parents=True, exist_ok=True)
            write_scores(scores, file, model)


def _record(
    continual: ContinualRun, partition: Partition, state: RunState
) -> dict[str, Any] | None:
    """Write and print the metrics of the partition, once; return them on rank 0. A collective."""
    folder, ranks, line = continual.folder, continual.ranks, None
    with ranks.raise_on_all_ranks():
        if ranks.is_first and folder.scores_of(partition.name).exists():
            line = record_metrics(continual.config, folder, partition, continual.before(state)[0])
            if line is not None:
                print_table(format_lines(continual.config, [line]))
    return line
