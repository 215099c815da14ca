"""The training loop: steps, validations with early stopping, checkpoints where they are due."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward
from torchrec.distributed.types import ShardedModule

from recsys.build import Job
from recsys.checkpoint.manager import Checkpoints
from recsys.checkpoint.progress import Progress
from recsys.config import content_settings
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions, loader
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.diagnostics.profile.step_profile import StepProfile
from recsys.distributed.lockstep import Lockstep, TrainingStopped
from recsys.evaluation.evaluate import evaluate_split, fill_bank
from recsys.evaluation.model_selection import selection_score, selection_words
from recsys.training.loss_watch import LossWatch
from recsys.training.reporter import Reporter


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
        is_cuda = self.job.ranks.device.type == "cuda"
        with closing(loader(self.interactions, self.job.config.num_workers, is_cuda)) as source:
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
        left, group = end - progress.batches, self.job.config.accumulate_steps
        batches = lockstep.training_batches(source, left, progress.steps, group)
        unknown = UnknownIds(self.job.schema)
        batches = self.job.preparation(batches, unknown, progress.steps, training=True)
        self.job.model.train()
        self.job.pipeline.begin(left)
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
            if job.pipeline.has_stepped:
                job.schedule.step()
                progress.dense_steps += 1
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
        """Validates, and keeps the model if it is the best, with averaged weights if there are."""
        averages = self.job.averages
        with averages.in_place() if averages is not None else nullcontext():
            self._validate_weights()

    def _validate_weights(self) -> None:
        job, progress = self.job, self.progress
        content = content_settings(job.config)
        if content is not None and content.history.refresh_bank_every_epoch:
            fill_bank(job, self.lockstep)
        report = evaluate_split(job, "valid", self.item_counts, self.lockstep)
        if (line := format_unknown("train", progress.ids)) is not None:
            self.reporter.say(f"{line}; {progress.vocabularies}")
        self.reporter.validation(progress, report)
        score = selection_score(report, job.config.best_model_by)
        if score is None:
            instead = "" if report["auc"] is None else ", or set best_model_by: auc"
            raise ValueError(
                f"{job.root}/valid: the {selection_words(job.config.best_model_by)}, which chooses "
                "the best model, is not defined there: AUC needs rows of both labels, GAUC a user "
                f"with rows of both; use a larger validation split{instead}"
            )
        if score > progress.best_score:
            progress.best_step, progress.best_score, progress.best = progress.steps, score, report
            progress.validations_without_gain = 0
            self.checkpoints.save_best(progress)
        else:
            progress.validations_without_gain += 1


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
