"""Weights & Biases through its own client, which reads WANDB_PROJECT, WANDB_MODE and so on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RUN_ID = "wandb_run_id"


class WandbTracker:
    """Records settings as the run's config and metrics by step. See `Tracker`.

    `RUN/wandb_run_id` keeps the identifier, so that a continued run is one run there, too.

    Raises:
        ValueError: the client is not installed.
    """

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        """Create the W&B run, or reopen it if the run continues."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "tracker wandb: Weights & Biases is not installed; run `pip install wandb`, or "
                "choose another tracker"
            ) from error
        kept = run / RUN_ID
        goes_on = first_step > 0 and kept.exists()
        self.run = wandb.init(
            dir=str(run),
            name=run.absolute().name,
            config=settings,
            id=kept.read_text().strip() if goes_on else None,
            resume="allow" if goes_on else None,
        )
        kept.write_text(f"{self.run.id}\n")

    def log(self, values: dict[str, float], step: int) -> None:
        """Record metrics of a step."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """End the W&B run."""
        self.run.finish()
