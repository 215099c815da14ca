"""Settings of what similar items of the history say of the target, `neighbours` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.config.limits import Dropout, NonNegativeFloat, PositiveInt, Width


@dataclass
class NeighbourSettings:
    """Kernel regression and votes by items of the history that are similar to the target."""

    values: str | None = None
    """List of numbers beside the history, such as stars, that the user gave each item; default:
    every item of the history counts as 1, as in logs of clicks or purchases."""
    dim: Width = 32
    """Width of the item vectors of the kernel: of those from co-occurrence, and from content."""
    taste_dim: Width = 128
    """Width of the item vectors from the users' values, by whose similarity items vote."""
    neighbours_per_item: PositiveInt = 256
    """Most similar items that are kept for each item while its vector is computed."""
    dropout: Dropout = 0.3
    """Share of a training batch's rows whose item counts as new, so that the model learns to rank
    new items by content."""
    partitions: PositiveInt = 30
    """Latest earlier partitions whose rows count in the statistics, too, in a continual run."""
    significance: NonNegativeFloat = 20.0
    """Similarities are multiplied by n / (n + significance), n the users that items share."""
