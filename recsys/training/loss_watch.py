"""End a job whose loss is not finite, and name the impressions of that step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recsys.data.row_source import RowSource
from recsys.distributed.ranks import Ranks


class LossWatch:
    """Checks the loss of every step; on a GPU some steps later, so that no step waits for it.

    Args:
        ranks: the ranks; only the losses of this rank are checked.
        rows: the training rows, to name those of a bad batch.
        every: on a GPU, steps between two checks.
        last_good: returns the last good checkpoint.
    """

    def __init__(
        self, ranks: Ranks, rows: RowSource, every: int, last_good: Callable[[], Path | None]
    ) -> None:
        """Keep the arguments; see the class."""
        self.ranks, self.rows, self.last_good = ranks, rows, last_good
        self.every = every if ranks.device.type == "cuda" else 1
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

    def step(self, step: int, loss: Tensor, row_positions: Tensor) -> Exception | None:  # [], [B]
        """Record the loss of a step; return an error if an unchecked loss is not finite."""
        self._unchecked.append((step, loss, row_positions))
        return self.check() if len(self._unchecked) >= self.every else None

    def check(self) -> Exception | None:
        """Check the losses recorded so far; return an error if one is not finite."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or bool(torch.stack([loss for _, loss, _ in unchecked]).isfinite().all()):
            return None
        step, loss, positions = next(one for one in unchecked if not one[1].isfinite())
        known = positions[positions >= 0].cpu().numpy()
        return ValueError(
            f"the loss is {float(loss)} at step {step} on rank {self.ranks.rank}, on "
            f"{len(known)} impressions between {self.rows.describe_range(known)}; look at these "
            f"rows, or lower the learning rates. The last good checkpoint is {self.last_good()}"
        )
