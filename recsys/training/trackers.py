"""Reports of a training run: lines or a progress bar, and trackers of settings and metrics."""

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from recsys.build import Job
from recsys.checkpoint.compatibility import flattened
from recsys.checkpoint.progress import Progress
from recsys.config import to_plain
from recsys.config.named_parts import make_part
from recsys.distributed.log import print_table, progress_bar
from recsys.evaluation.evaluate import format_evaluation
from recsys.evaluation.model_selection import flat_metrics, tracked_name
from recsys.extras import missing_extra

logger = logging.getLogger(__name__)

TRACKERS = {
    "tensorboard": "recsys.training.trackers:TensorBoardTracker",
    "mlflow": "recsys.training.trackers:MLflowTracker",
    "wandb": "recsys.training.trackers:WandbTracker",
}
MLFLOW_EXPERIMENT = "recsys"  # unless MLFLOW_EXPERIMENT_NAME is set
# Files of the run with its identifier, for a run that continues.
MLFLOW_RUN, WANDB_RUN = "mlflow_run_id", "wandb_run_id"


@runtime_checkable
class Tracker(Protocol):
    r"""Records one run, on rank 0 alone.

    Arguments:
        run: the run's folder.
        settings: by full name (`optimizer.learning_rate`).
        first_step: step of this start; existing records of later steps are void.
    """

    def log(self, values: dict[str, float], step: int) -> None:
        """Record metrics by name, such as `train/loss`, `valid/auc` or `test/auc`, of a step."""

    def close(self) -> None:
        """End the recording; nothing is logged afterwards."""


def make_trackers(
    names: Sequence[str], run: Path, settings: dict[str, Any], first_step: int
) -> list[Tracker]:
    """Build the trackers of the setting; an unknown or uninstalled one is a ValueError."""
    base: Any = Tracker  # mypy takes no protocol here
    return [make_part("tracker", name, TRACKERS, base, run, settings, first_step) for name in names]


class TensorBoardTracker:
    """Events in `RUN/tensorboard`; settings are in the run's own `config.yaml`."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class MLflowTracker:
    """MLflow through its client: the server of MLFLOW_TRACKING_URI, or files in the run."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        # MLflow refuses its store of files, which needs no database, unless this is set.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        except ImportError as error:
            raise missing_extra("trackers", "tracker mlflow", error) from error
        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI", (run / "mlflow").absolute().as_uri())
        self._client = MlflowClient(tracking_uri=uri)
        id_file = run / MLFLOW_RUN
        if first_step and id_file.exists():
            self.run_id = id_file.read_text().strip()
            self._client.update_run(self.run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", MLFLOW_EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.run_id = self._client.create_run(number, run_name=run.absolute().name).info.run_id
        id_file.write_text(f"{self.run_id}\n")
        params = [Param(_mlflow_name(name), str(value)) for name, value in settings.items()]
        self._client.log_batch(self.run_id, params=params)

    def log(self, values: dict[str, float], step: int) -> None:
        milliseconds = int(1000 * time.time())
        metrics = [
            self._metric(_mlflow_name(name), float(value), milliseconds, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


def _mlflow_name(name: str) -> str:
    """Return a name without characters that MLflow refuses, such as `@` of recall@10."""
    return re.sub(r"[^\w.\- :/]", "_", name.replace("@", "_at_"))


class WandbTracker:
    """Weights & Biases through its client, which reads WANDB_PROJECT, WANDB_MODE and so on."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing_extra("trackers", "tracker wandb", error) from error
        id_file = run / WANDB_RUN
        is_continued = first_step > 0 and id_file.exists()
        self.run = wandb.init(
            dir=str(run),
            name=run.absolute().name,
            config=settings,
            id=id_file.read_text().strip() if is_continued else None,
            resume="allow" if is_continued else None,
        )
        id_file.write_text(f"{self.run.id}\n")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


NOT_TRACKED = ("calibration", "num_samples", "num_users", "gauc_users", "sum_of_weights")


class Reporter:
    """Shows a progress bar or logs lines, and feeds the trackers. Building it is a collective."""

    def __init__(
        self, job: Job, run: Path, progress: Progress, counts_all_steps: bool = False
    ) -> None:
        self.job, self.active = job, job.ranks.is_first
        self.steps_before = progress.steps_before if counts_all_steps else 0
        self.interval = job.config.log_every_steps
        self.trackers: list[Tracker] = []
        with job.ranks.raise_on_all_ranks():
            if self.active:
                settings = flattened(to_plain(job.config))
                first_step = self.steps_before + progress.steps
                self.trackers = make_trackers(job.config.tracker, run, settings, first_step)
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
        if progress.steps % self.interval and not is_last:
            return
        rate = progress.samples / progress.seconds
        values = self._means(losses)
        text = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.bar.set_postfix_str(f"{text} {rate:,.0f} samples/s")
        if self.bar.disable:
            seconds_left = (self.num_batches - progress.batches) * progress.seconds / progress.steps
            logger.info(
                f"epoch {progress.epoch + 1} step {progress.batches}/{self.num_batches} {text} "
                f"{rate:,.0f} samples/s, {tqdm.format_interval(seconds_left)} left"
            )
        if is_last:
            self.bar.close()  # its last state stays on the screen
        values["samples_per_second"] = rate
        if self.job.pipeline.has_stepped:
            values["gradient_norm"] = float(self.job.pipeline.update.gradient_norm())
        bank = self.job.em3.content.bank if self.job.em3.content is not None else None
        if bank is not None:
            values["bank_coverage"] = bank.coverage()
            values["bank_age"] = bank.mean_age(progress.age)
        self.write({f"train/{name}": value for name, value in values.items()}, progress.steps)

    def _means(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Return the means of the losses over the ranks: those of the step. A collective."""
        totals = torch.tensor([float(value) for value in losses.values()], dtype=torch.float64)
        dist.all_reduce(totals, group=self.job.ranks.group)
        return dict(zip(losses, (totals / self.job.ranks.world_size).tolist(), strict=True))

    def write(self, values: dict[str, float], step: int) -> None:
        """Pass metrics to every tracker; a tracker that fails does not end training."""
        for tracker in self.trackers:
            with self._warn_on_failure(tracker):
                tracker.log(values, self.steps_before + step)

    @contextmanager
    def _warn_on_failure(self, tracker: Tracker) -> Iterator[None]:
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
            for name, value in flat_metrics({**report, "retrieval": searched}).items()
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
            with self._warn_on_failure(tracker):
                tracker.close()
