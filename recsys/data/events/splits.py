"""Decides which samples are train, valid and test: SQL conditions on the stage `rows`.

A cut in time lies at a quantile of the rows' times, and the rows of that moment come before it, as
`numpy.quantile(..., method="lower")` has it: so a moment is never cut in two.
"""

from __future__ import annotations

import math

from recsys.data.events.engines.base import Engine
from recsys.data.events.settings import Split
from recsys.data.events.times import moment

SPLITS = ("train", "valid", "test")
BINS = 1 << 14  # of a histogram of times
Conditions = dict[str, dict[str, str]]  # dataset -> split -> SQL


def split_conditions(engine: Engine, split: Split) -> Conditions:
    """Return the SQL condition of each split of each dataset; the only dataset has no name.

    Raises:
        ValueError: a date is no date.
    """
    if split.by == "windows":
        windows = {}
        for number in range(1, split.windows + 1):
            tenth = 10 - split.windows + number
            ends = quantiles(engine, [(tenth - 2) / 10, (tenth - 1) / 10, tenth / 10])
            windows[f"window-{number}"] = _until(ends, "ts <= {}")
        return windows
    if split.by == "user":
        # Each user's rows, ordered by time: m older ones of n come before m <= q (n - 1).
        ends = [f"CAST('{share}' AS DOUBLE) * (total - 1)" for share in split.at[:2]]
        return {"": _until([*ends, "total"], "older <= {}")}
    if split.by == "dates":
        days = [str(moment(str(day), "UTC")) for day in split.at]
        return {"": _until(days, "ts < {}")}
    shares = [float(share) for share in split.at]
    ends = quantiles(engine, shares if len(shares) == 3 else [*shares, 1.0])
    return {"": _until(ends, "ts <= {}")}


def _until(ends: list[str], test: str) -> dict[str, str]:
    """Return conditions of splits that end one after another; without a third end, test is all."""
    conditions = {}
    before = ""
    for place, name in enumerate(SPLITS):
        here = test.format(ends[place]) if place < len(ends) else "1 = 1"
        conditions[name] = f"{here}{before}"
        before = f" AND NOT ({here})"
    return conditions


def quantiles(engine: Engine, shares: list[float]) -> list[str]:
    """Return times of the rows at these shares of their order, by histograms on the engine."""
    limits = engine.table("SELECT min(ts) AS low, max(ts) AS high, count(*) AS n FROM rows")
    low, high, rows = (limits[name][0].as_py() for name in ("low", "high", "n"))
    places = [math.floor(share * (rows - 1)) for share in shares]
    return [str(_time_at(engine, place, low, high)) for place in places]


def _time_at(engine: Engine, place: int, low: int, high: int) -> int:
    """Return the time of the row at a place of the order; all rows lie in [low, high]."""
    before = 0  # rows earlier than `low`
    while low < high:
        width = (high - low) // BINS + 1
        table = engine.table(
            f"SELECT CAST((ts - {low} - (ts - {low}) % {width}) / {width} AS BIGINT) AS bin, "
            f"count(*) AS n FROM rows WHERE ts BETWEEN {low} AND {high} GROUP BY 1 ORDER BY 1"
        )
        for number, count in zip(table["bin"].to_pylist(), table["n"].to_pylist(), strict=True):
            if before + count > place:
                low, high = low + number * width, min(high, low + (number + 1) * width - 1)
                break
            before += count
    return low
