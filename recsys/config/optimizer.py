"""Settings of the optimizer of the dense parts, `optimizer` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recsys.config.limits import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitInterval,
)


@dataclass
class OptimizerSettings:
    """Optimizer of the dense parts; the ID tables have their own in `embedding`."""

    name: str = "adamw"
    """adamw, adam, sgd, adafactor, or a class of your own as `package.module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that class."""
    learning_rate: NonNegativeFloat = 1e-3
    """Learning rate of parameters without one of the rates below."""
    content_learning_rate: NonNegativeFloat = 1e-3
    """Learning rate of projections, fusion, history maps and contrastive heads."""
    encoder_learning_rate: NonNegativeFloat = 1e-4
    """Learning rate of trained parameters inside the encoders."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of weights; biases and normalisation layers have none."""
    warmup_steps: NonNegativeInt = 20
    """Steps in which the learning rates rise from 0."""
    schedule: str = "constant"
    """Course of the learning rates after warm-up: constant, cosine, linear, or a function of your
    own as `package.module:function`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, such as `final_share`."""
    decay_steps: PositiveInt | None = None
    """Steps after warm-up until a decay ends; default: all epochs."""
    clip_norm: PositiveFloat | None = None
    """Gradient clipping: largest norm of the gradient of all dense parameters together."""
    ema_decay: UnitInterval | None = None
    """Evaluate and keep the exponential moving average of the dense weights with this decay, which
    it reaches after some steps."""
    ema_tables: bool = False
    """Average the ID tables, too: their memory once more, and a pass over all rows in each step."""
