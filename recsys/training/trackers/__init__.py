"""Trackers record a run's settings and metrics for people who follow it: the setting `tracker`.

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
    r"""Records one run; rank 0 alone makes it.

    It is made with these arguments:
        run: the run's folder, for files of the tracker's own.
        settings: settings of the run, by full name (`optimizer.learning_rate`).
        first_step: the step from which the run continues; 0 for a new one. Records of later steps
            are from a job that ended before its checkpoint.

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
    """Make the trackers that the setting `tracker` names.

    Raises:
        ValueError: there is no such tracker, or its client is not installed.
    """
    return [
        make_part("tracker", name, TRACKERS, Tracker, run, settings, first_step)  # type: ignore[type-abstract]
        for name in names
    ]
