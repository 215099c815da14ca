"""What a training run tells: a progress bar or lines, and TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from recsys.build import Job
from recsys.checkpoint.progress import Progress
from recsys.evaluation.metrics import format_report


class Reporter:
    """Progress bar on a terminal, plain lines elsewhere, TensorBoard beside; rank 0 speaks.

    Args:
        job: what trains.
        run: the run's folder.
        progress: where the run starts or goes on; events of later steps are replaced.
    """

    def __init__(self, job: Job, run: Path, progress: Progress) -> None:
        self.job, self.active = job, job.ranks.is_first
        self.every = job.config.log_every_steps
        self.terminal = sys.stderr.isatty()
        self.writer = (
            SummaryWriter(str(run / "tensorboard"), purge_step=progress.steps + 1)
            if self.active
            else None
        )
        self.bar = tqdm(disable=not (self.active and self.terminal))

    def begin(self, num_batches: int, progress: Progress) -> None:
        """Starts the bar of an epoch, or of what is left of it."""
        self.num_batches = num_batches
        self.bar.reset(num_batches)
        self.bar.update(progress.batches)

    def say(self, text: str) -> None:
        if self.active:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, progress: Progress, losses: dict[str, Tensor]) -> None:
        """After each step. A collective."""
        self.bar.update()
        if progress.steps % self.every:
            return
        values = self._values(progress, losses)
        rate = progress.samples / progress.seconds
        text = " ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
        self.bar.set_postfix_str(f"{text} {rate:,.0f} samples/s")
        if not self.terminal:
            self.say(
                f"epoch {progress.epoch + 1} step {progress.batches}/{self.num_batches} {text} "
                f"{rate:,.0f} samples/s"
            )
        self.write({f"train/{name}": value for name, value in values.items()}, progress.steps)
        self.write({"train/samples_per_second": rate}, progress.steps)

    def _values(self, progress: Progress, losses: dict[str, Tensor]) -> dict[str, float]:
        values = {name: float(value) for name, value in losses.items()}
        if self.job.pipeline.has_stepped:
            values["gradient_norm"] = float(self.job.pipeline.update.gradient_norm())
        bank = self.job.em3.content.bank if self.job.em3.content is not None else None
        if bank is not None:
            values["bank_coverage"] = bank.coverage()
            values["bank_age"] = bank.mean_age(progress.steps)
        return values

    def write(self, values: dict[str, float], step: int) -> None:
        """Scalars to TensorBoard."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def validation(self, progress: Progress, report: dict[str, Any]) -> None:
        self.say(f"validation after step {progress.steps}\n{format_report(report)}")
        names = ("auc", "gauc", "logloss", "ne")
        known = {f"valid/{name}": report[name] for name in names if report[name] is not None}
        self.write(known, progress.steps)

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
