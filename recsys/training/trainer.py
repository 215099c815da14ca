"""The training loop: steps, validations with early stopping, checkpoints when they are due."""

import gc
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from recsys.build import Job
from recsys.checkpoint.manager import Checkpoints
from recsys.checkpoint.progress import Progress
from recsys.config import content_settings
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions, loader
from recsys.data.item_frequency import ItemCounts
from recsys.data.row_source import RowSource
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.diagnostics.profile import StepProfile
from recsys.distributed.lockstep import Lockstep, TrainingStopped
from recsys.distributed.ranks import Ranks
from recsys.distributed.torchrec_internals import require_pipelined
from recsys.evaluation.evaluate import evaluate_split, fill_bank, undefined_selection
from recsys.evaluation.model_selection import (
    needs_search,
    selection_score,
    selection_text,
    warn_of_undefined,
)
from recsys.training.callbacks import Callbacks
from recsys.training.initial_state import refill_cold_rows
from recsys.training.trackers import Reporter

logger = logging.getLogger(__name__)

LIVING_OBJECTS = 20_000  # more than a step makes; cycles in user code are still collected


@dataclass
class Trainer:
    """The training loop of a job, and the parts that it uses besides the model."""

    job: Job
    run: Path
    interactions: Interactions
    checkpoints: Checkpoints
    lockstep: Lockstep
    reporter: Reporter
    progress: Progress
    item_counts: ItemCounts  # training impressions
    saves_before_validation: ClassVar[bool] = True  # before the first one

    def __post_init__(self) -> None:
        if (negatives := self.job.preparation.negatives) is not None:
            negatives.counts = self.item_counts
        # These must not reference the trainer: a cycle would keep the model after the run.
        job, checkpoints = self.job, self.checkpoints
        interval, steps = job.config.log_every_steps, job.config.profile_steps
        rows = self.interactions.rows
        self.loss_watch = LossWatch(job.ranks, rows, interval, lambda: checkpoints.last_good)
        self.profile = StepProfile(job.em3, job.ranks, steps, self.run)
        self.callbacks = Callbacks(job)

    @property
    def is_finished(self) -> bool:
        config, progress = self.job.config, self.progress
        steps_without_gain = progress.steps - progress.best_step
        has_waited = steps_without_gain >= config.patience_share * progress.best_step
        is_out_of_patience = progress.validations_without_gain >= config.patience and has_waited
        return progress.epoch >= config.epochs or is_out_of_patience

    def train(self) -> None:
        """Train until epochs or patience end, or until TrainingStopped. A collective."""
        if self.is_finished:
            return
        job, progress = self.job, self.progress
        if progress.steps:
            self._end_decay_with_last_epoch()
        self.callbacks.run(lambda callback: callback.begin(job, progress))
        try:
            with relaxed_gc():
                while not self.is_finished:
                    self.train_epoch()
        except TrainingStopped:
            self.checkpoints.save(progress, wait=True)
            raise
        self.checkpoints.save(progress, wait=True)
        self.callbacks.run(lambda callback: callback.end(job, progress))

    def _end_decay_with_last_epoch(self) -> None:
        """Set where a resumed run's decay ends, from the updates made and those to come.

        The run may have been begun with another number of ranks or another batch size.
        """
        job, progress, interactions = self.job, self.progress, self.interactions
        count = job.config.validations_per_epoch
        ends = [interactions.batches_until(index, count) for index in range(count + 1)]
        interactions.begin(progress.epoch, progress.stages, progress.batches)
        later = range(progress.validations + 1, count + 1)
        stops = [progress.batches, *(interactions.batches_until(index, count) for index in later)]
        num_updates = progress.dense_steps + job.updates_between(list(accumulate(stops, max)))
        epochs_after = job.config.epochs - progress.epoch - 1
        job.end_decay(num_updates + epochs_after * job.updates_between(ends))
        job.set_step(progress.age, progress.dense_steps)

    def train_epoch(self) -> None:
        """Train for the rest of an epoch, or until patience ends. A collective.

        Segments of an epoch end with a validation; stretches of a segment end with a checkpoint.
        """
        config, progress = self.job.config, self.progress
        self.interactions.begin(progress.epoch, progress.stages, progress.batches)
        self.reporter.begin(self.interactions.num_batches, progress)
        is_cuda, num_segments = self.job.ranks.device.type == "cuda", config.validations_per_epoch
        with closing(loader(self.interactions, config.num_workers, is_cuda)) as source:
            while (index := progress.validations) < num_segments:
                segment_start = self.interactions.batches_until(index, num_segments)
                segment_end = self.interactions.batches_until(index + 1, num_segments)
                first_step = progress.steps
                self.train_stretch(source, segment_end)
                if self.lockstep.save or self._checkpoint_is_due(first_step, segment_end):
                    self.checkpoints.save(progress)
                    self.lockstep.saved()
                if progress.batches >= segment_end:
                    if segment_end > segment_start or index + 1 == num_segments:
                        self._validate()
                    progress.validations += 1
                    if self.is_finished:
                        return
        progress.begin_next_epoch()

    def train_stretch(self, source: Iterator[Batch], segment_end: int) -> None:
        """Take steps until a validation, a checkpoint or a request to end. A collective."""
        job, progress, lockstep = self.job, self.progress, self.lockstep
        unknown = UnknownIds(job.schema)
        start = time.perf_counter() - progress.seconds
        job.model.train()
        job.pipeline.begin(segment_end - progress.batches)
        count = self._batches_until_pause(segment_end)
        batches = lockstep.training_batches(source, count, job.config.accumulate_steps)
        batches = job.preparation(batches, unknown, progress.age, training=True)
        with lockstep.watchdog.armed(), self.profile:
            # Forward, backward and the update: of tables in each step, of the rest once per group.
            for losses, _, batch in job.pipeline.outputs(batches):
                if progress.steps == 0:
                    require_pipelined(job.model)
                if job.pipeline.has_stepped:
                    job.schedule.step()
                    progress.dense_steps += 1
                progress.steps += 1
                progress.batches += 1
                progress.samples += batch.batch_size * job.ranks.world_size
                progress.seconds = time.perf_counter() - start
                loss, positions = losses["loss"], batch.rows.positions
                lockstep.record_error(self.loss_watch.step(progress.steps, loss, positions))
                self.reporter.step(progress, losses)  # logs every `log_every_steps`
                self.callbacks.step(progress, losses, lockstep)
                if lockstep.stop or lockstep.save:
                    lockstep.end_stretch()  # the pipeline still trains on fetched batches
                lockstep.watchdog.record_progress(f"step {progress.steps}")
                self.profile.step()
        lockstep.record_error(self.loss_watch.check())
        lockstep.sync_errors()  # so that no state after a bad loss is ever saved
        progress.count_ids(job, unknown)
        progress.peak_bytes = max(progress.peak_bytes, peak_bytes(job.ranks.device))
        if lockstep.stop:
            raise TrainingStopped

    def _batches_until_pause(self, segment_end: int) -> int:
        """Count batches until the segment ends or a checkpoint is due by steps, in whole groups."""
        interval, group = self.job.config.checkpoint.every_steps, self.job.config.accumulate_steps
        batches_left = segment_end - self.progress.batches
        if interval is None:
            return batches_left
        until_due = interval - self.progress.steps % interval
        return min(batches_left, -(-until_due // group) * group)

    def _checkpoint_is_due(self, first_step: int, segment_end: int) -> bool:
        """Return whether a checkpoint is due: by steps, or before the first validation."""
        progress, interval = self.progress, self.job.config.checkpoint.every_steps
        is_first = progress.best_step < 0 and progress.batches >= segment_end
        if is_first and self.saves_before_validation:
            return True
        return interval is not None and progress.steps // interval > first_step // interval

    def _refresh_bank(self) -> None:
        """Encode all items again, if `refresh_bank_every_epoch` is set. A collective."""
        content = content_settings(self.job.config.content)
        if content is not None and content.history.refresh_bank_every_epoch:
            fill_bank(self.job, self.lockstep)

    def _validate(self) -> None:
        """Validate, with averaged weights if kept, and keep the best model. A collective."""
        job, progress, metric = self.job, self.progress, self.job.config.best_model_by
        searches = needs_search(metric)
        with job.averaged():
            self.checkpoints.require_finite(progress)
            self._refresh_bank()
            refill_cold_rows(job)
            report = evaluate_split(
                job, "valid", self.item_counts, self.lockstep, searches, fits_blend=True
            )
            line = format_unknown("train", progress.ids, progress.vocabularies)
            if line is not None:
                logger.info(line)
            self.reporter.validation(progress, report)
            self.callbacks.run(lambda callback: callback.validation(job, progress, report))
            score = selection_score(report, metric)
            if score is None:
                cause = f"the {selection_text(metric)} is not defined there"
                raise ValueError(undefined_selection(job.root, metric, cause))
            if progress.best_step < 0 and job.ranks.is_first:
                warn_of_undefined(job.root, report, metric)
            progress.validations_without_gain += 1
            if progress.best_step < 0 or score > progress.best_score:
                progress.best_step, progress.best_score = progress.steps, score
                progress.best, progress.validations_without_gain = report, 0
                self.checkpoints.save_best(progress)


class LossWatch:
    """Checks the losses of this rank; on a GPU every few steps, so that no step waits for it."""

    def __init__(
        self, ranks: Ranks, rows: RowSource, interval: int, last_good: Callable[[], Path | None]
    ) -> None:
        self.ranks, self.rows, self.last_good = ranks, rows, last_good
        self.interval = interval if ranks.device.type == "cuda" else 1
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

    def step(self, step: int, loss: Tensor, row_positions: Tensor) -> Exception | None:  # [], [B]
        """Record the loss of a step; return an error if an unchecked loss is not finite."""
        self._unchecked.append((step, loss, row_positions))
        return self.check() if len(self._unchecked) >= self.interval else None

    def check(self) -> Exception | None:
        """Check the losses recorded so far; return an error if one is not finite."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or bool(torch.stack([loss for _, loss, _ in unchecked]).isfinite().all()):
            return None
        step, loss, positions = next(entry for entry in unchecked if not entry[1].isfinite())
        rows = positions[positions >= 0].cpu().numpy()
        return ValueError(
            f"the loss is {float(loss)} at step {step} on rank {self.ranks.rank}, on "
            f"{len(rows)} impressions between {self.rows.describe_range(rows)}; look at these "
            f"rows, or lower the learning rates. The last good checkpoint is {self.last_good()}"
        )


@contextmanager
def relaxed_gc() -> Iterator[None]:
    """Start Python's garbage collector less often: it costs 10 % of a short step."""
    limits = gc.get_threshold()
    gc.set_threshold(max(limits[0], LIVING_OBJECTS) if limits[0] else 0, *limits[1:])
    try:
        yield
    finally:
        gc.set_threshold(*limits)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory of this process so far: of its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
