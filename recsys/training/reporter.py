"""Reports of a training run: a progress bar or lines in the log, and the trackers' records."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from recsys.build import Job
from recsys.checkpoint.compatibility import flattened
from recsys.checkpoint.progress import Progress
from recsys.config import to_plain
from recsys.distributed.log import print_table, progress_bar
from recsys.evaluation.evaluate import format_evaluation
from recsys.evaluation.model_selection import tracked_name
from recsys.training.trackers import Tracker, make_trackers

logger = logging.getLogger(__name__)

NOT_TRACKED = ("calibration", "num_samples", "num_users", "gauc_users", "sum_of_weights")


class Reporter:
    """Shows a progress bar on a terminal, logs lines elsewhere, and feeds the trackers, on rank 0.

    Building it is a collective, so that a tracker that fails at its start ends all ranks.
    """

    def __init__(
        self, job: Job, run: Path, progress: Progress, counts_all_steps: bool = False
    ) -> None:
        self.job, self.active = job, job.ranks.is_first
        self.steps_before = progress.steps_before if counts_all_steps else 0
        self.every = job.config.log_every_steps
        self.trackers: list[Tracker] = []
        with job.ranks.raise_on_all_ranks():
            if self.active:
                settings = flattened(to_plain(job.config))
                names = job.config.tracker
                first_step = self.steps_before + progress.steps
                self.trackers = make_trackers(names, run, settings, first_step)
        self.bar = progress_bar(0, "", shown=False)

    def begin(self, num_batches: int, progress: Progress) -> None:
        self.num_batches = num_batches
        self.bar.close()
        name = f"epoch {progress.epoch + 1}/{self.job.config.epochs}"
        self.bar = progress_bar(num_batches, name, self.active, initial=progress.batches)

    def step(self, progress: Progress, losses: dict[str, Tensor]) -> None:
        """Report a step every `log_every_steps`, and the last of an epoch. A collective."""
        self.bar.update()
        is_last = progress.batches == self.num_batches
        if progress.steps % self.every and not is_last:
            return
        values = self._values(progress, losses)
        rate = progress.samples / progress.seconds
        text = " ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
        self.bar.set_postfix_str(f"{text} {rate:,.0f} samples/s")
        if self.bar.disable:
            seconds_left = (self.num_batches - progress.batches) * progress.seconds / progress.steps
            logger.info(
                "epoch %d step %d/%d %s %s samples/s, %s left",
                *(progress.epoch + 1, progress.batches, self.num_batches),
                *(text, f"{rate:,.0f}", tqdm.format_interval(seconds_left)),
            )
        if is_last:
            self.bar.close()  # its last state stays on the screen
        self.write({f"train/{name}": value for name, value in values.items()}, progress.steps)
        self.write({"train/samples_per_second": rate}, progress.steps)

    def _values(self, progress: Progress, losses: dict[str, Tensor]) -> dict[str, float]:
        values = {name: float(value) for name, value in losses.items()}
        if self.job.pipeline.has_stepped:
            values["gradient_norm"] = float(self.job.pipeline.update.gradient_norm())
        bank = self.job.em3.content.bank if self.job.em3.content is not None else None
        if bank is not None:
            values["bank_coverage"] = bank.coverage()
            values["bank_age"] = bank.mean_age(progress.age)
        return values

    def write(self, values: dict[str, float], step: int) -> None:
        """Pass metrics to every tracker; a tracker that fails does not end training."""
        for tracker in self.trackers:
            with self._warning_of(tracker):
                tracker.log(values, self.steps_before + step)

    @contextmanager
    def _warning_of(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logger.warning("%s failed, training goes on: %s", type(tracker).__name__, error)

    def evaluation(self, split: str, step: int, report: dict[str, Any]) -> None:
        """Pass the numeric metrics of a split, and those of each label, to the trackers."""
        for label, metrics in report.get("labels", {}).items():
            self.evaluation(f"{split}/{label}", step, metrics)
        searched = {k: value for k, value in report.get("retrieval", {}).items() if "@" in k}
        numbers = {
            f"{split}/{tracked_name(name)}": float(value)
            for name, value in {**searched, **report}.items()
            if isinstance(value, int | float) and name not in NOT_TRACKED
        }
        self.write(numbers, step)

    def validation(self, progress: Progress, report: dict[str, Any]) -> None:
        if self.active:
            tables = format_evaluation(report, self.job.config.ranking, self.job.config.metrics)
            print_table(f"validation after step {progress.steps}\n{tables}")
        self.evaluation("valid", progress.steps, report)

    def close(self) -> None:
        self.bar.close()
        for tracker in self.trackers:
            with self._warning_of(tracker):
                tracker.close()
