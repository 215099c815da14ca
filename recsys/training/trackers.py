"""Trackers, which record a run's settings and metrics: built in, or `package.module:Class`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from recsys.config.named_parts import make_part

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
    """Build the trackers that the setting `tracker` names.

    Raises:
        ValueError: a tracker is unknown, or its client is not installed.
    """
    kind: Any = Tracker
    arguments = run, settings, first_step
    return [make_part("tracker", name, TRACKERS, kind, *arguments) for name in names]


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
            raise ValueError(
                "tracker mlflow: MLflow is not installed; run `pip install mlflow-skinny`, or "
                "choose another tracker"
            ) from error
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
        params = [Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self.run_id, params=params)

    def log(self, values: dict[str, float], step: int) -> None:
        milliseconds = int(1000 * time.time())
        # MLflow allows no `@` in names, as in recall@10.
        metrics = [
            self._metric(name.replace("@", "_at_"), float(value), milliseconds, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class WandbTracker:
    """Weights & Biases through its client, which reads WANDB_PROJECT, WANDB_MODE and so on."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "tracker wandb: Weights & Biases is not installed; run `pip install wandb`, or "
                "choose another tracker"
            ) from error
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
