"""Learning rates that fall where validation stops improving: `optimizer.schedule: plateau`.

Other schedules must know in advance how long training lasts. This one is for runs that find their
own length: many `epochs` as a limit, early stopping by `patience`, and smaller steps before that.
torch.optim.lr_scheduler.ReduceLROnPlateau decides; all ranks give it the same score.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

# The part of ReduceLROnPlateau's state that changes; the rest are its arguments.
_COUNTERS = ("best", "num_bad_epochs", "last_epoch")


class Plateau:
    """A share of the learning rates that validations without a gain multiply by `factor`.

    Args:
        factor: in (0, 1).
        patience: validations without a gain that are let pass before the share falls.
        threshold: the score has to rise by more than this to count as a gain.
        final_share: the share falls no lower, in [0, 1).

    Raises:
        ValueError: an argument is outside its range.

    Example::

        from recsys.optimizer.plateau import Plateau

        share = Plateau(factor=0.5)
        for score in (0.70, 0.72, 0.71):
            share.validated(score)
        share(step=100, decay_steps=0)  # 0.5, as the third validation gained nothing
    """

    def __init__(
        self,
        factor: float = 0.3,
        patience: int = 0,
        threshold: float = 0.0,
        final_share: float = 0.0,
    ) -> None:
        """Check the arguments, and begin with a share of 1."""
        for name, value, valid, words in (
            ("factor", factor, 0 < factor < 1, "> 0 and < 1"),
            ("patience", patience, patience == int(patience) >= 0, "a whole number >= 0"),
            ("threshold", threshold, 0 <= threshold < inf, ">= 0 and finite"),
            ("final_share", final_share, 0 <= final_share < 1, ">= 0 and < 1"),
        ):
            if not valid:
                raise ValueError(f"{name} is {value}; it must be {words}")
        # The scheduler changes the rate of an optimizer without parameters to train: the share.
        self._rate = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        self._scheduler = ReduceLROnPlateau(
            self._rate, "max", factor, patience, threshold, "abs", min_lr=final_share, eps=0.0
        )

    def __call__(self, step: int, decay_steps: int) -> float:
        """Return the share, which depends on validations alone."""
        return float(self._rate.param_groups[0]["lr"])

    def validated(self, score: float) -> None:
        """Note the score of a validation; the highest is best."""
        self._scheduler.step(score)

    def state_dict(self) -> dict[str, float]:
        """Return the share and the scheduler's counters, for checkpoints."""
        counters = {name: getattr(self._scheduler, name) for name in _COUNTERS}
        return {"share": self(0, 0), **counters}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue with a state of `state_dict`."""
        self._rate.param_groups[0]["lr"] = state["share"]
        self._scheduler.load_state_dict({name: state[name] for name in _COUNTERS})
