"""The training loop: steps, validations with early stopping, checkpoints when they are due."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from recsys.build import Job
from recsys.checkpoint.manager import Checkpoints
from recsys.checkpoint.new_rows.fill import refill_new_rows
from recsys.checkpoint.progress import Progress
from recsys.config import content_settings
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions, loader
from recsys.data.item_frequency import ItemCounts
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.diagnostics.profile import StepProfile
from recsys.distributed.lockstep import Lockstep, TrainingStopped
from recsys.distributed.torchrec_internals import require_pipelined
from recsys.evaluation.evaluate import evaluate_split, fill_bank
from recsys.evaluation.model_selection import needs_search, selection_score, selection_words
from recsys.evaluation.validation_check import undefined_selection
from recsys.training.garbage import collected_seldom
from recsys.training.loss_watch import LossWatch
from recsys.training.reporter import Reporter

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """A job in training, with all parts of its loop besides the model."""

    job: Job
    run: Path
    interactions: Interactions
    checkpoints: Checkpoints
    lockstep: Lockstep
    reporter: Reporter
    progress: Progress
    item_counts: ItemCounts  # training impressions

    def __post_init__(self) -> None:
        """Add the watch of losses and the profile of the first steps; negatives get the counts."""
        if (negatives := self.job.preparation.negatives) is not None:
            negatives.use_counts(self.item_counts)
        # Their functions must not hold the trainer: a circle would keep the model of a run that has
        # ended until garbage is collected, at the latest while the interpreter shuts down.
        job, checkpoints = self.job, self.checkpoints
        every, steps = job.config.log_every_steps, job.config.profile_steps
        rows = self.interactions.rows
        self.loss_watch = LossWatch(job.ranks, rows, every, lambda: checkpoints.last_good)
        self.profile = StepProfile(job.em3, job.ranks, steps, self.run)

    def train(self) -> None:
        """Train until epochs or patience end. A collective.

        Raises:
            TrainingStopped: the job was asked to end; its state is saved.
            ValueError: on every rank, a row cannot be used, a loss is not finite, or a checkpoint
                cannot be written.
        """
        if self.progress.is_finished(self.job.config):
            return
        try:
            with collected_seldom():
                while not self.progress.is_finished(self.job.config):
                    self.train_epoch()
        except TrainingStopped:
            self.checkpoints.save(self.progress, wait=True)
            raise
        self.checkpoints.save(self.progress, wait=True)

    def train_epoch(self) -> None:
        """Train for the rest of an epoch, or until patience ends. A collective.

        An epoch has parts, each of which ends with a validation, and parts have stretches, each of
        which ends with a checkpoint: all ranks agree on the end of a stretch in advance.
        """
        job, progress, lockstep, config = self.job, self.progress, self.lockstep, self.job.config
        self.interactions.begin(progress.epoch, progress.stages, progress.batches)
        self.reporter.begin(self.interactions.num_batches, progress)
        is_cuda, parts = job.ranks.device.type == "cuda", config.validations_per_epoch
        with closing(loader(self.interactions, config.num_workers, is_cuda)) as source:
            while progress.validations < parts:
                begin_of_part, end_of_part = self._part(progress.validations)
                first_step = progress.steps
                unknown = UnknownIds(job.schema)
                job.pipeline.begin(end_of_part - progress.batches)
                count = self._batches_until_pause(end_of_part)
                batches = lockstep.training_batches(source, count, config.accumulate_steps)
                with lockstep.watchdog.armed(), self.profile:
                    for losses, batch in self._steps(batches, unknown):
                        loss, positions = losses["loss"], batch.row_positions
                        lockstep.record_error(self.loss_watch.step(progress.steps, loss, positions))
                        self.reporter.step(progress, losses)  # logs every `log_every_steps`
                        if lockstep.stop or lockstep.save:
                            lockstep.end_stretch()  # the pipeline ends its fetched batches
                        lockstep.watchdog.mark(f"step {progress.steps}")
                        self.profile.step()
                lockstep.record_error(self.loss_watch.check())
                lockstep.sync_errors()  # so that no state after a bad loss is ever saved
                progress.count_ids(job, unknown)
                if lockstep.stop:
                    raise TrainingStopped
                if lockstep.save or self._checkpoint_is_due(first_step, end_of_part):
                    self.checkpoints.save(progress)
                    lockstep.saved()
                if progress.batches >= end_of_part:
                    if end_of_part > begin_of_part or progress.validations + 1 == parts:
                        self._validate()
                    progress.validations += 1
                    if progress.is_finished(config):
                        return
        progress.begin_next_epoch()

    def _steps(
        self, batches: Iterator[Batch], unknown: UnknownIds
    ) -> Iterator[tuple[dict[str, Tensor], Batch]]:
        """Yield losses and batch of each step once parameters are updated. A collective."""
        job, progress = self.job, self.progress
        job.model.train()
        start = time.perf_counter() - progress.seconds
        prepared = job.preparation(batches, unknown, progress.age, training=True)
        for losses, _, batch in job.pipeline.outputs(prepared):
            if progress.steps == 0:
                require_pipelined(job.model)
            if job.pipeline.has_stepped:
                job.schedule.step()
                progress.dense_steps += 1
            progress.steps += 1
            progress.batches += 1
            progress.samples += batch.batch_size * job.ranks.world_size
            progress.seconds = time.perf_counter() - start
            yield losses, batch

    def _part(self, number: int) -> tuple[int, int]:
        """Return the batches of the epoch before and up to the end of a part."""
        parts = self.job.config.validations_per_epoch
        return (
            self.interactions.batches_until(number, parts),
            self.interactions.batches_until(number + 1, parts),
        )

    def _batches_until_pause(self, end_of_part: int) -> int:
        """Count batches until the part ends or a checkpoint is due by steps, in whole groups."""
        every, group = self.job.config.checkpoint.every_steps, self.job.config.accumulate_steps
        left = end_of_part - self.progress.batches
        if every is None:
            return left
        until_due = every - self.progress.steps % every
        return min(left, -(-until_due // group) * group)

    def _checkpoint_is_due(self, first_step: int, end_of_part: int) -> bool:
        """Return whether a checkpoint has become due by steps since a stretch began.

        One is due before the first validation, too: a killed run with only a best model would lose
        the state of its optimizers.
        """
        if self.progress.best_step < 0 and self.progress.batches >= end_of_part:
            return True
        return self._is_due_by_steps(first_step)

    def _is_due_by_steps(self, first_step: int) -> bool:
        every = self.job.config.checkpoint.every_steps
        return every is not None and self.progress.steps // every > first_step // every

    def _validate(self) -> None:
        """Validate, with averaged weights if kept, and keep the best model. A collective."""
        with self.job.averaged():
            self._validate_weights()

    def _validate_weights(self) -> None:
        """Validate the weights in place. A collective."""
        job, progress = self.job, self.progress
        self.checkpoints.require_finite(progress)
        content = content_settings(job.config)
        if content is not None and content.history.refresh_bank_every_epoch:
            fill_bank(job, self.lockstep)
        refill_new_rows(job, self.run)
        searches = needs_search(job.config.best_model_by)
        report = evaluate_split(job, "valid", self.item_counts, self.lockstep, searches)
        if (line := format_unknown("train", progress.ids)) is not None:
            logger.info("%s; %s", line, progress.vocabularies)
        self.reporter.validation(progress, report)
        score = selection_score(report, job.config.best_model_by)
        if score is None:
            cause = f"the {selection_words(job.config.best_model_by)} is not defined there"
            raise ValueError(undefined_selection(job, cause))
        if progress.best_step < 0 or score > progress.best_score:
            progress.best_step, progress.best_score, progress.best = progress.steps, score, report
            progress.validations_without_gain = 0
            self.checkpoints.save_best(progress)
        else:
            progress.validations_without_gain += 1
