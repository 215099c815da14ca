"""Decides which samples are train, valid and test: SQL conditions on the stage `rows`.

Cuts are lower quantiles of time, so that a moment is never cut in two.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath

from recsys.data.events.settings import EventsConfig
from recsys.data.events.sql import SqlEngine, count_rows
from recsys.data.events.times import moment

SPLITS = ("train", "valid", "test")
BINS = 1 << 14  # of a histogram of times
MOMENT = "(ts)"  # SQL of a row's time in conditions
Conditions = dict[str, dict[str, str]]  # dataset -> split -> SQL


def split_conditions(engine: SqlEngine, config: EventsConfig) -> tuple[Conditions, dict[str, int]]:
    """Return the SQL condition of each split of each dataset, and rows in no split by reason.

    With `embargo`, rows of train (valid) whose label is decided in valid (test) are in no split.
    """
    datasets = _cuts(engine, config)
    whole = {name: _until(*cuts) for name, cuts in datasets.items()}
    reasons: dict[str, int] = {}
    if config.split.by in ("time", "dates") and len(config.split.at) == 3:
        ends, test = datasets[""]
        if count := count_rows(engine, f"rows WHERE NOT ({test.format(ends[2])})"):
            reasons["after the end of test"] = count
    if not (config.embargo and config.label_window):
        return whole, reasons
    conditions: Conditions = {}
    for dataset, splits in whole.items():
        ends, test = datasets[dataset]
        conditions[dataset] = dict(splits)
        for split, following, end in zip(SPLITS[:2], SPLITS[1:], ends, strict=False):
            decided = test.format(end).replace(MOMENT, f"ts + {config.label_window}")
            if config.split.by == "user":
                begin = f"{following}_begin"
                decided = f"({begin} IS NULL OR ts + {config.label_window} < {begin})"
            conditions[dataset][split] = f"{splits[split]} AND {decided}"
            count = count_rows(engine, f"rows WHERE {splits[split]} AND NOT ({decided})")
            if count:
                name = str(PurePosixPath(dataset, split))
                reasons[f"embargo: label of {name} decided after {following} begins"] = count
    return conditions, reasons


def _cuts(engine: SqlEngine, config: EventsConfig) -> dict[str, tuple[list[str], str]]:
    """Return by dataset where its splits end, and the SQL test of a row before such an end."""
    split = config.split
    if split.by == "windows":
        tenths = {number: 10 - split.windows + number for number in range(1, split.windows + 1)}
        return {
            f"window-{number}": (
                quantiles(engine, [(tenth - 2) / 10, (tenth - 1) / 10, tenth / 10]),
                f"{MOMENT} <= {{}}",
            )
            for number, tenth in tenths.items()
        }
    if split.by == "user":
        return {"": ([*map(_user_end, split.at[:2]), "total"], "older <= {}")}
    if split.by == "dates":
        days = [str(moment(str(day), config.time_zone)) for day in split.at]
        return {"": (days, f"{MOMENT} < {{}}")}
    shares = [float(share) for share in split.at]
    ends = quantiles(engine, shares if len(shares) == 3 else [*shares, 1.0])
    return {"": (ends, f"{MOMENT} <= {{}}")}


def _user_end(share: float | str) -> str:
    """Return SQL of the most older rows of a user that a row of a split has."""
    # Each user's rows, ordered by time: m older ones of n come before m <= q (n - 1).
    return f"CAST('{share}' AS DOUBLE) * (total - 1)"


def user_columns(rows: str, shares: list[float | str]) -> str:
    """Return SQL that adds `older`, `total`, `valid_begin` and `test_begin` for a split by user."""
    ordered = (
        f"SELECT *, rank() OVER (PARTITION BY uid ORDER BY ts) - 1 AS older, "
        f"count(*) OVER (PARTITION BY uid) AS total FROM ({rows})"
    )
    begins = ", ".join(
        f"min(CASE WHEN older > {_user_end(share)} THEN ts END) OVER (PARTITION BY uid) "
        f"AS {split}_begin"
        for split, share in zip(SPLITS[1:], shares, strict=False)
    )
    return f"SELECT *, {begins} FROM ({ordered})"


def _until(ends: list[str], test: str) -> dict[str, str]:
    """Return conditions of splits that end one after another; without a third end, test is all."""
    conditions = {}
    before = ""
    for place, name in enumerate(SPLITS):
        condition = test.format(ends[place]) if place < len(ends) else "1 = 1"
        conditions[name] = f"{condition}{before}"
        before = f" AND NOT ({condition})"
    return conditions


def quantiles(engine: SqlEngine, shares: list[float]) -> list[str]:
    """Return times of the rows at these shares of their order, by histograms on the engine."""
    limits = engine.table("SELECT min(ts) AS low, max(ts) AS high, count(*) AS n FROM rows")
    low, high, rows = (limits[name][0].as_py() for name in ("low", "high", "n"))
    places = [math.floor(share * (rows - 1)) for share in shares]
    return [str(_time_at(engine, place, low, high)) for place in places]


def _time_at(engine: SqlEngine, place: int, low: int, high: int) -> int:
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
