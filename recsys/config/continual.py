"""Settings of a continual run, which goes from partition to partition; `continual` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recsys.config.limits import PositiveFloat, PositiveInt, Seconds, Share


@dataclass
class ContinualSettings:
    """Training on one partition after another (`recsys continual`); other commands ignore it."""

    passes: PositiveInt = 1
    """Passes over the rows of a partition, in place of `epochs`."""
    order: Literal["shuffled", "time"] = "shuffled"
    """Order of a partition's rows: shuffled by the seed, or that of its files, which are then to
    be written in the order of time; each rank takes a stretch of them."""
    keep: PositiveInt = 2
    """Number of latest partitions whose models and checkpoints are kept."""
    quiet_seconds: Seconds | None = None
    """With --follow: a partition without _SUCCESS is whole when none of its files has changed for
    so many seconds; default: only _SUCCESS counts."""
    poll_seconds: PositiveFloat = 10.0
    """With --follow: seconds from one look for a new partition to the next."""
    edited_items: Share = 0.5
    """Largest share of the known items whose content may change from one partition to the next;
    above it ids are taken to have changed their meaning, which is an error."""
