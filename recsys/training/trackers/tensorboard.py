"""Events for TensorBoard, in `RUN/tensorboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """Writes scalars; settings are in the run's own `config.yaml`. See `Tracker`."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        """Open the event files; drop events after `first_step`."""
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Record metrics of a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the event files."""
        self.writer.close()
