"""Training: the loop, validation with early stopping, and what a run leaves behind.

A run's folder holds `config.yaml` (resolved), `plan.txt`, `checkpoints/`, TensorBoard events and,
written last, `metrics.json`. The same command on the same folder goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward
from torchrec.distributed.types import ShardedModule

from recsys.batch import Batch
from recsys.build import Job, build_job, content_settings
from recsys.checkpoint import Checkpoints, load_best
from recsys.config import Config
from recsys.content.projection_start import start_projections
from recsys.data.interactions import Interactions, loader
from recsys.data.parquet_rows import ParquetRows
from recsys.data.vocabularies import UnknownIds, format_unknown, mapped
from recsys.evaluation import check_data, evaluate_split, fill_bank
from recsys.lockstep import Lockstep, TrainingStopped
from recsys.loss_watch import LossWatch
from recsys.metrics import format_report
from recsys.pretrained_tables import load_pretrained_tables
from recsys.profiling import StepProfile
from recsys.progress import Progress
from recsys.ranks import Ranks
from recsys.reporter import Reporter
from recsys.run_folder import (
    ITEM_COUNTS,
    SKIPPED_ROWS,
    Resume,
    begin_run,
    check_vocabularies,
    describe_run,
    find_start,
    keep_vocabularies,
)
from recsys.watchdog import Watchdog

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers", "peft", "torchx")


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass
class Trainer:
    """A job in training, with everything beside the model that its loop works with."""

    job: Job
    run: Path
    interactions: Interactions
    checkpoints: Checkpoints
    lockstep: Lockstep
    loss_watch: LossWatch
    profile: StepProfile
    reporter: Reporter
    progress: Progress
    item_counts: np.ndarray

    def train(self) -> None:
        """Trains until epochs or patience end.

        Raises:
            TrainingStopped: the job was asked to end; its state is saved.
            ValueError: on every rank, when a row, the loss or storage is wanting.
        """
        if self.progress.is_finished(self.job.config):
            return
        try:
            while not self.progress.is_finished(self.job.config):
                self._train_epoch()
        except TrainingStopped:
            self.checkpoints.save(self.progress, wait=True)
            raise
        self.checkpoints.save(self.progress, wait=True)

    def _train_epoch(self) -> None:
        """The rest of an epoch with its validations, or up to where patience ends."""
        progress, parts = self.progress, self.job.config.validations_per_epoch
        self.interactions.begin(progress.epoch, progress.stages, progress.batches)
        self.reporter.begin(self.interactions.num_batches, progress)
        source = iter(
            loader(
                self.interactions, self.job.config.num_workers, self.job.ranks.device.type == "cuda"
            )
        )
        while progress.validations < parts:
            part = progress.validations + 1
            end = self.interactions.batches_until(part, parts)
            while progress.batches < end:
                self._train_until(end, source)
            if part == parts or end > self.interactions.batches_until(part - 1, parts):
                self._validate()
            progress.validations = part
            if progress.is_finished(self.job.config):
                return
        progress.begin_next_epoch()

    def _train_until(self, end: int, source: Iterator[Batch]) -> None:
        """Steps up to batch `end` of the epoch, or to where a checkpoint is due and saved."""
        progress, lockstep = self.progress, self.lockstep
        batches = lockstep.training_batches(source, end - progress.batches, progress.steps)
        unknown = UnknownIds(self.job.schema)
        batches = mapped(batches, self.job.vocabularies, unknown, progress.steps, training=True)
        self.job.model.train()
        with lockstep.watchdog.armed(), self.profile:
            self._make_steps(batches)
        lockstep.error = lockstep.error or self.loss_watch.check()
        lockstep.settle()  # so that no state after a bad loss is ever saved
        progress.count_ids(self.job, unknown)
        lockstep.raise_if_stopped()
        if lockstep.save:
            self.checkpoints.save(progress)
            lockstep.saved()

    def _make_steps(self, batches: Iterator[Batch]) -> None:
        progress, job, lockstep = self.progress, self.job, self.lockstep
        start, before = time.perf_counter(), progress.seconds
        while True:
            try:
                losses, _, batch = cast(Any, job.pipeline.progress(batches))
            except StopIteration:
                return
            if progress.steps == 0:
                require_pipelined(job.model)
            job.schedule.step()
            progress.steps += 1
            progress.batches += 1
            progress.samples += batch.batch_size * job.ranks.world_size
            progress.seconds = before + time.perf_counter() - start
            error = self.loss_watch.step(progress.steps, losses["loss"], batch.row_positions)
            lockstep.error = lockstep.error or error
            self.reporter.step(progress, losses)
            lockstep.watchdog.mark(f"step {progress.steps}")
            self.profile.step()

    def _validate(self) -> None:
        """Validates, and keeps the model if it is the best."""
        job, progress = self.job, self.progress
        content = content_settings(job.config)
        if content is not None and content.history.refresh_bank_every_epoch:
            fill_bank(job, self.lockstep)
        report = evaluate_split(job, "valid", self.item_counts, self.lockstep)
        if (line := format_unknown("train", progress.ids)) is not None:
            self.reporter.say(f"{line}; {progress.vocabularies}")
        self.reporter.validation(progress, report)
        if report["auc"] is None:
            raise ValueError(
                f"{job.root}/valid: all labels are equal, so no AUC can choose the best model; use "
                "a larger validation split"
            )
        if report["auc"] > progress.best_auc:
            progress.best_step, progress.best_auc, progress.best = (
                progress.steps,
                report["auc"],
                report,
            )
            progress.validations_without_gain = 0
            self.checkpoints.save_best(progress)
        else:
            progress.validations_without_gain += 1


def train(
    config: Config,
    data: str,
    run: Path,
    ranks: Ranks,
    overwrite: bool = False,
    resume: Resume = "auto",
) -> dict[str, Any]:
    """Trains, keeps the best model, and returns what `metrics.json` holds. A collective.

    Args:
        config: every setting.
        data: dataset, a folder or URL.
        run: folder of the run; where it holds a checkpoint, training goes on from it.
        ranks: the ranks of the job.
        overwrite: start anew instead, and replace what the folder holds.
        resume: auto; never: refuse a folder with a run; must: refuse one without.

    Raises:
        TrainingStopped: the job was asked to end; its state is saved.
        ValueError: on every rank, when data, configuration, plan or checkpoint are wanting.
    """
    goes_on = find_start(run, resume, overwrite, ranks)
    with (
        Watchdog(ranks, config.stall_timeout) as watchdog,
        Lockstep(ranks, config.checkpoint, watchdog) as lockstep,
    ):
        job = build_job(config, data, ranks)
        with ranks.all_or_none():
            rows = ParquetRows.of_split(job.root, "train", job.schema, config.on_bad_row)
            build = job.batch_builder()
            interactions = Interactions(
                rows, build, config.batch_size, ranks.rank, ranks.world_size, config.seed
            )
        checkpoints = Checkpoints(job, run, rows.fingerprint())
        if goes_on:
            check_vocabularies(run, job)
        progress = checkpoints.restore() if goes_on else None
        if progress is None:
            item_counts, skipped = check_data(job)
            begin_run(run, item_counts, skipped, ranks)
            keep_vocabularies(run, job)
        else:
            item_counts = np.load(run / ITEM_COUNTS)
        describe_run(run, job, data)
        fresh = progress is None
        progress = progress or Progress()
        reporter = Reporter(job, run, progress)
        reporter.say(f"{job.plan}\n\n{job.parameters}\n")
        if not fresh:
            reporter.say(f"going on after step {progress.steps} from {checkpoints.last_good}")
        else:
            start_fresh(job, reporter)
        watch = LossWatch(ranks, rows, config.log_every_steps, lambda: checkpoints.last_good)
        profile = StepProfile(
            job.em3,
            ranks,
            config.profile_steps,
            run,
            reporter.say,
            lambda values: reporter.write(values, progress.steps),
        )
        trainer = Trainer(
            job,
            run,
            interactions,
            checkpoints,
            lockstep,
            watch,
            profile,
            reporter,
            progress,
            item_counts,
        )
        try:
            trainer.train()
        except TrainingStopped as stopped:
            raise TrainingStopped(
                f"asked to end after step {progress.steps}; the state is in "
                f"{checkpoints.last_good}, and the same command goes on from there"
            ) from stopped
        finally:
            reporter.close()
            checkpoints.close()
        return _finish(trainer)


def start_fresh(job: Job, reporter: Reporter) -> None:
    """What a run that goes on has behind it: pretrained tables, projections, the first bank."""
    for line in load_pretrained_tables(job):
        reporter.say(line)
    if job.em3.content is not None and job.store is not None:
        start_projections(job.em3.content, job.store, job.ranks)
        fill_bank(job)


def require_pipelined(model: nn.Module) -> None:
    """Checks, after a first step, that the ids of every sharded module are sent ahead of theirs.

    TorchRec only logs a warning where it cannot, and training is then as slow as without pipeline.

    Raises:
        RuntimeError: a sharded module is not pipelined.
    """
    for name, module in model.named_modules():
        if isinstance(module, ShardedModule) and not isinstance(module.forward, BaseForward):
            raise RuntimeError(
                f"sharded module '{name}' is not pipelined: EM3.forward must stay a straight line "
                "and give each collection an attribute of the batch itself"
            )


def _finish(trainer: Trainer) -> dict[str, Any]:
    """Tests the best model and writes `metrics.json`."""
    job, run, progress = trainer.job, trainer.run, trainer.progress
    best = load_best(job, run)
    if best["step"] != progress.best_step:
        raise ValueError(
            f"{run}/checkpoints/best: is of step {best['step']}, but the best of this run is of "
            f"step {progress.best_step}; train on with more epochs, or anew with --overwrite true"
        )
    metrics: dict[str, Any] = {
        "valid": progress.best,
        "test": evaluate_split(job, "test", trainer.item_counts),
        "train": {
            "samples_per_second": progress.samples / progress.seconds,
            "seconds": progress.seconds,
            "steps": progress.steps,
            **({"ids": progress.ids} if progress.ids else {}),
            **({"vocabularies": progress.vocabularies} if progress.vocabularies else {}),
        },
        "world_size": job.ranks.world_size,
        "versions": versions(),
    }
    if job.config.on_bad_row == "skip":
        metrics["skipped_rows"] = json.loads((run / SKIPPED_ROWS).read_text())
    if job.ranks.is_first:
        partial = run / ".metrics.json"
        partial.write_text(json.dumps(metrics, indent=2) + "\n")
        partial.rename(run / "metrics.json")
        print(f"test\n{format_report(metrics['test'])}\nwritten to {run}", flush=True)
    return metrics
