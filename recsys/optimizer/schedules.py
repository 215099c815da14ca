"""Learning rates over the steps: linear warm-up, then constant, cosine, linear, or your own.

A rate depends on the number of dense updates alone, so a resumed run has the same rates.
"""

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from recsys.config import OptimizerSettings
from recsys.config.named_parts import find_part

SCHEDULES = {
    name: f"recsys.optimizer.schedules:{name}" for name in ("constant", "cosine", "linear")
}


def constant(step: int, decay_steps: int) -> float:
    """Return 1 at every step after warm-up."""
    return 1.0


def cosine(step: int, decay_steps: int, final_share: float = 0.0) -> float:
    """Return a share that falls from 1 along half a cosine to `final_share` at `decay_steps`."""
    return final_share + (1 - final_share) * (1 + math.cos(math.pi * _share(step, decay_steps))) / 2


def linear(step: int, decay_steps: int, final_share: float = 0.0) -> float:
    """Return a share that falls from 1 along a line to `final_share` at `decay_steps`."""
    return 1 - (1 - final_share) * _share(step, decay_steps)


def _share(step: int, decay_steps: int) -> float:
    return min(step / max(decay_steps, 1), 1.0)


class LearningRateShare:
    """Share of the configured learning rates after a number of dense updates.

    A user's `settings.schedule` gets the updates since warm-up, `decay_steps` and the options.

    Example::

        from recsys.config import OptimizerSettings
        from recsys.optimizer import LearningRateShare

        settings = OptimizerSettings(schedule="linear", warmup_steps=2, decay_steps=4)
        share = LearningRateShare(settings)
        [share(step) for step in range(6)]  # [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self.settings, name = settings, settings.schedule
        self.decay_steps = settings.decay_steps or 0
        self.function: Callable[..., Any] = find_part("optimizer.schedule", name, SCHEDULES)
        try:
            float(self.function(0, decay_steps=1, **settings.schedule_options))
        except Exception as error:  # a user's function may raise any error
            raise ValueError(
                f"optimizer.schedule '{name}' cannot be called with a step, decay_steps and the "
                f"schedule_options {settings.schedule_options} ({type(error).__name__}: {error})"
            ) from error

    def end_at(self, num_updates: int) -> None:
        """Set the number of dense updates at which decay ends, unless the settings have it."""
        if self.settings.decay_steps is None:
            self.decay_steps = max(num_updates - self.settings.warmup_steps, 1)

    def __call__(self, step: int) -> float:
        warmup_steps, options = self.settings.warmup_steps, self.settings.schedule_options
        warmup = min(1.0, (step + 1) / max(warmup_steps, 1))
        updates = max(step - warmup_steps, 0)
        return warmup * float(self.function(updates, decay_steps=self.decay_steps, **options))


def set_updates(schedule: LambdaLR, num_updates: int) -> None:
    """Set the learning rates to those after `num_updates` dense updates."""
    schedule.last_epoch = num_updates
    for group, base, share in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * share(num_updates)
