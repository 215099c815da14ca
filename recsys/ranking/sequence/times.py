"""Ages of history items and times between them, in buckets of doubling width.

Ages are counted back from the moment of the row that is ranked, and are all that a model knows of
time: the time between two events is the difference of their ages. So nothing that happens after the
row can be read from them.

Shapes: N history items of the batch, P parallel lists, S sequences, L longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.aged_attention import NUM_AGES
from recsys.ranking.settings import GapScale

SECONDS_PER_DAY = 86_400
EXPONENT_BITS, EXPONENT_OF_ONE = 23, 127  # of a float32


def doubling_buckets(gaps: Tensor) -> Tensor:
    """Return floor(log2(1 + gap)), int64 in [0, NUM_AGES), of float32 gaps of any shape.

    The exponent of a floating-point number is that logarithm, and reading it costs a fraction of a
    logarithm of each pair of events. Negative gaps count as 0.
    """
    bits = (gaps.float().clamp(min=0) + 1).view(torch.int32)
    return ((bits >> EXPONENT_BITS) - EXPONENT_OF_ONE).clamp(max=NUM_AGES - 1).long()


def times_between(ages: Tensor) -> Tensor:  # [S, L] -> int64 [S, L, L]
    """Return the bucket of the time from each event (last axis) to each (second axis)."""
    return doubling_buckets(ages.unsqueeze(1) - ages.unsqueeze(2))


@dataclass(frozen=True)
class TimeGaps:
    """Place of the ages of history items among the parallel lists, and their scale.

    column: of the ages; None: there are none.
    flags: the columns that models read as numbers.
    scale: linear: a unit such as seconds; log_days: log10(1 + days) / 2, as `recsys prepare`
        writes ages.
    """

    column: int | None
    flags: list[int]
    scale: GapScale = "linear"

    @staticmethod
    def of(name: str | None, dimensions: InputDimensions, scale: GapScale = "linear") -> TimeGaps:
        """Find the list of ages by its name; None: there is none.

        Ages in seconds are not among `flags`, since their scale differs too much.

        Raises:
            ValueError: no parallel list has this name.
        """
        lists = dimensions.parallel_names
        if name is not None and name not in lists:
            raise ValueError(
                f"ranking.time_gaps is '{name}'; the parallel lists of the history in schema.yaml "
                f"are {list(lists)}"
            )
        column = None if name is None else lists.index(name)
        dropped = column if scale == "linear" else None
        flags = [place for place in range(dimensions.num_parallel) if place != dropped]
        return TimeGaps(column, flags, scale)

    def ages(self, values: Tensor) -> Tensor | None:  # [N, P] -> [N, 1]
        """Return the ages of history items, in seconds if their scale is `log_days`."""
        if self.column is None:
            return None
        ages = values[:, [self.column]]
        if self.scale == "log_days":
            ages = (torch.pow(10.0, 2 * ages) - 1) * SECONDS_PER_DAY
        return ages.clamp(min=0)
