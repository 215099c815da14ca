"""Trackers, which record a run's settings and metrics: the setting `tracker`.

A tracker of your own is a class with the methods of `Tracker`, named `package.module:Class`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from recsys.config.named_parts import make_part

TRACKERS = {
    "tensorboard": "recsys.training.trackers.tensorboard:TensorBoardTracker",
    "mlflow": "recsys.training.trackers.mlflow:MLflowTracker",
    "wandb": "recsys.training.trackers.wandb:WandbTracker",
}


@runtime_checkable
class Tracker(Protocol):
    r"""Records one run; only rank 0 builds it.

    It is called with these arguments:
        run: the run's folder, in which the tracker may write files.
        settings: settings of the run, by full name (`optimizer.learning_rate`).
        first_step: the step from which the run continues; 0 for a new run. Existing records of
            later steps come from a job that ended before its checkpoint.

    Example::

        class LinesTracker:
            def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
                self.file = open(run / "metrics.txt", "a" if first_step else "w")

            def log(self, values: dict[str, float], step: int) -> None:
                self.file.writelines(f"{step} {name} {value}\n" for name, value in values.items())

            def close(self) -> None:
                self.file.close()
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
    return [
        make_part("tracker", name, TRACKERS, Tracker, run, settings, first_step)  # type: ignore[type-abstract]
        for name in names
    ]
