"""Order of an epoch's rows on each rank, also after a restart with another number of ranks.

An epoch visits every row once. Its order depends only on the seed, the epoch and the number of
ranks, so that a few numbers describe a position in it. When another number of ranks (or another
batch size) continues an epoch, the rows that the earlier ranks have not read are concatenated and
distributed again: no row is read twice and none is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from recsys.data.row_source import RowSource, Window


@dataclass(frozen=True)
class Stage:
    """A part of an epoch read by one number of ranks: the first `batches` of each rank."""

    world_size: int
    batch_size: int
    batches: int


@dataclass(frozen=True)
class Slice:
    """Rows `[low, high)` of a window, counted after the window's shuffle."""

    window: Window
    low: int
    high: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.high - self.low


def between(slices: Sequence[Slice], low: int, high: int) -> list[Slice]:
    """Return the rows at positions `[low, high)` of the concatenated slices."""
    found, place = [], 0
    for piece in slices:
        first, last = max(low - place, 0), min(high - place, len(piece))
        if first < last:
            found.append(Slice(piece.window, piece.low + first, piece.low + last))
        place += len(piece)
    return found


def num_batches_of(num_rows: int, batch_size: int) -> int:
    """Return the number of batches of at most `batch_size` rows that hold `num_rows` rows."""
    return -(-num_rows // batch_size)


def rows_before(batch: int, num_rows: int, num_batches: int) -> int:
    """Return the number of rows before number `batch` of `num_batches` nearly equal batches."""
    return num_rows * batch // num_batches if num_batches else 0


@dataclass(frozen=True)
class EpochShare:
    """Rows of an epoch that one rank reads."""

    slices: list[Slice]
    num_rows: int  # rows of the largest share of all ranks, to which the others are padded
    rows_done: int  # rows read by all ranks of earlier stages

    @staticmethod
    def of(
        rows: RowSource,
        stages: Sequence[Stage],
        rank: int,
        world_size: int,
        shuffle_seed: tuple[int, int] | None,
    ) -> EpochShare:
        """Return the share of `rank` in the rows that the `stages` have not read."""
        rest: list[Slice] | None = None
        for stage in stages:
            shares = _shares(rows, rest, stage.world_size, shuffle_seed)
            largest = max(sum(map(len, share)) for share in shares)
            num_batches = num_batches_of(largest, stage.batch_size)
            done = rows_before(stage.batches, largest, num_batches)
            rest = [piece for share in shares for piece in between(share, done, largest)]
        shares = _shares(rows, rest, world_size, shuffle_seed)
        left = rows.num_rows if rest is None else sum(map(len, rest))
        return EpochShare(shares[rank], -(-left // world_size), rows.num_rows - left)


def _shares(
    rows: RowSource, rest: list[Slice] | None, world_size: int, shuffle_seed: tuple[int, int] | None
) -> list[list[Slice]]:
    """Return the shares of all ranks in the remaining rows or the epoch, each in own windows."""
    if rest is not None:  # one contiguous share per rank; lengths differ by at most one row
        num_rows = sum(map(len, rest))
        cuts = [num_rows * rank // world_size for rank in range(world_size + 1)]
        return [between(rest, low, high) for low, high in pairwise(cuts)]
    return [
        [
            Slice(window, 0, window.stop - window.start)
            for window in rows.windows(*rows.share(rank, world_size), shuffle_seed)
        ]
        for rank in range(world_size)
    ]
