"""Settings of the losses besides the ranking loss, `contrastive` and `auxiliary` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from recsys.config.limits import NonNegativeFloat, PositiveInt, Width


@dataclass
class ContrastiveSettings:
    """Content-ID-Contrastive loss."""

    weight: NonNegativeFloat = 0.0
    """Weight of the loss; 0 turns it off."""
    variant: Literal["in_batch", "published"] = "in_batch"
    """Negatives: all items of the batch, or `num_negatives` sampled ones as published."""
    dim: Width = 32
    """Width of the space in which content and ID vectors are compared."""
    temperature: float = 0.1
    """Divisor of the cosines; the initial value if it is learned."""
    learn_temperature: bool = False
    """Train the temperature."""
    normalize: bool = True
    """Compare directions (cosine) rather than vectors (dot product)."""
    num_negatives: PositiveInt = 16
    """Sampled negatives of the published variant."""
    stop_gradient: Literal["none", "content", "id"] = "none"
    """Side that gets no gradient from the loss."""
    all_ranks: bool = False
    """Take the negatives of in_batch from every rank."""


@dataclass
class AuxiliarySettings:
    """A loss besides the ranking and contrastive losses."""

    loss: str
    """distillation, or a class of your own as `package.module:Class`."""
    weight: NonNegativeFloat = 1.0
    """Weight of the loss."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""
