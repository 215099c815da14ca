"""Makes the stage `rows`: impressions, or the events that are samples, with labels and splits.

Splits are SQL conditions on the stage. Cuts are lower quantiles of time, so that a moment is never
cut in two.
"""

from __future__ import annotations

import logging
import math
from pathlib import PurePosixPath

import numpy as np

from recsys.data.events.clean_events import IMPRESSION
from recsys.data.events.settings import EventsConfig, Label, Split, Weight
from recsys.data.events.sql import (
    FOREVER,
    SqlEngine,
    count_by_reason,
    count_rows,
    filled,
    literal,
    one_value,
    quoted,
)
from recsys.data.events.times import duration, moment

logger = logging.getLogger(__name__)


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
            if config.split.by in ("user", "leave_last"):
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
    if split.by in ("user", "leave_last"):
        return {"": ([*_user_ends(split), "total"], "older <= {}")}
    if split.by == "dates":
        days = [str(moment(str(day), config.time_zone)) for day in split.at]
        return {"": (days, f"{MOMENT} < {{}}")}
    shares = [float(share) for share in split.at]
    ends = quantiles(engine, shares if len(shares) == 3 else [*shares, 1.0])
    return {"": (ends, f"{MOMENT} <= {{}}")}


def _user_ends(split: Split) -> list[str]:
    """Return SQL of the most older rows of a user that a row of train, and of valid, has."""
    if split.by == "leave_last":  # test comes first, then train with one row, then valid
        return [f"greatest(total - {count * split.last}, 1) - 1" for count in (2, 1)]
    # Each user's rows, ordered by time: m older ones of n come before m <= q (n - 1).
    return [f"CAST('{share}' AS DOUBLE) * (total - 1)" for share in split.at[:2]]


def user_columns(rows: str, split: Split) -> str:
    """Return SQL that adds `older`, `total`, `valid_begin` and `test_begin` for a split by user."""
    # Shares of a user's rows cut no moment in two; the last rows are counted one by one.
    order = "rank() OVER (PARTITION BY uid ORDER BY ts"
    if split.by == "leave_last":
        order = "row_number() OVER (PARTITION BY uid ORDER BY ts, position"
    ordered = (
        f"SELECT *, {order}) - 1 AS older, count(*) OVER (PARTITION BY uid) AS total FROM ({rows})"
    )
    begins = ", ".join(
        f"min(CASE WHEN older > {end} THEN ts END) OVER (PARTITION BY uid) AS {name}_begin"
        for name, end in zip(SPLITS[1:], _user_ends(split), strict=True)
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
    histograms: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    return [
        str(high if place == rows - 1 else _time_at(engine, place, low, high, histograms))
        for place in places
    ]


def _time_at(
    engine: SqlEngine,
    place: int,
    low: int,
    high: int,
    histograms: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
) -> int:
    """Return the time of the row at a place of the order; all rows lie in [low, high].

    `histograms` are those of other places, by their limits: bins, and the rows in each.
    """
    before = 0  # rows earlier than `low`
    while low < high:
        width = (high - low) // BINS + 1
        if (low, high) not in histograms:
            table = engine.table(
                f"SELECT CAST((ts - {low} - (ts - {low}) % {width}) / {width} AS BIGINT) AS bin, "
                f"count(*) AS n FROM rows WHERE ts BETWEEN {low} AND {high} GROUP BY 1 ORDER BY 1"
            )
            histograms[low, high] = table["bin"].to_numpy(), table["n"].to_numpy()
        bins, counts = histograms[low, high]
        ends = before + np.cumsum(counts)
        bin_index = int(np.searchsorted(ends, place, side="right"))
        before, number = int(ends[bin_index] - counts[bin_index]), int(bins[bin_index])
        low, high = low + number * width, min(high, low + (number + 1) * width - 1)
    return low


WEIGHT = "/weight"  # a column; names with / are none of the dataset's
DAY, END = "/day", "/end"  # of rows that are due: the date when they are written, and its end
UNRIPE = "unripe: `within` ends after the log"  # reason of rows left out


def actions_in(actions: list[str] | None) -> str:
    """Return an SQL condition on `action`; None: any but impressions."""
    if actions is None:
        return f"action <> '{IMPRESSION}'"
    return f"action IN ({', '.join(map(literal, actions))})"


def make_rows(engine: SqlEngine, config: EventsConfig, due: str | None = None) -> dict[str, int]:
    """Make the stage `rows`: position, uid, iid, ts, labels `l_NAME`, context `c_NAME`.

    With a weight it has `/weight`, and late columns as `late_NAME`. `due` is a stage of rows whose
    labels are decided, with `/day` and `/end`; None: all rows of the log.

    It counts the rows left out, by reason. If none is left, or a label cannot be made of the log,
    it is a ValueError.
    """
    required = _make_labelled(engine, config, due)
    _check_given_labels(engine, config.labels)
    _check_weights(engine, config.weight)
    if due is None and not count_rows(engine, "labelled"):
        actions = config.rows or "any"
        raise ValueError(f"rows: no event has an action of {actions}; correct the names of actions")
    names = engine.table("SELECT * FROM labelled LIMIT 0").schema.names
    columns = ", ".join(quoted(name) for name in names if name != "ripe")
    is_complete, reasons = complete_rows(engine, "labelled", required)
    query = f"SELECT {columns} FROM labelled WHERE {is_complete}"
    if due is None and config.split.by in ("user", "leave_last"):
        engine.add("rows", user_columns(query, config.split))
    else:
        engine.view("rows", query)
    if due is None and not count_rows(engine, "rows"):
        fix = "correct these columns"
        if UNRIPE in reasons:
            fix += ", shorten `within`, or set unripe: keep"
        raise ValueError(f"rows: none is left; {reasons} were left out; {fix}")
    return reasons


def complete_rows(
    engine: SqlEngine, stage: str, required: dict[str, str]
) -> tuple[str, dict[str, int]]:
    """Return the SQL condition of rows without null in some columns; count the others by reason."""
    nulls = {reason: f"{quoted(column)} IS NULL" for reason, column in required.items()}
    if not nulls:
        return "1 = 1", {}
    reasons = count_by_reason(engine, nulls, stage)
    reasons.pop("", None)
    return f"NOT ({' OR '.join(nulls.values())})", reasons


def _make_labelled(engine: SqlEngine, config: EventsConfig, due: str | None) -> dict[str, str]:
    """Make the stage `labelled` of rows; return the columns that a sample needs, by reason."""
    if due is None:
        _check_actions(engine, config.actions)
    rows = f"SELECT * FROM unique_events WHERE {is_row(config)}"
    engine.view("candidates", rows if due is None else f"SELECT * FROM {due}")
    attributed = {
        name: label for name, label in config.labels.items() if label.action and label.within
    }
    attribute = _attributed if due is None else _attributed_in_time
    source = attribute(engine, attributed, config) if attributed else "candidates"
    columns = [
        "position, uid, iid, ts",
        *([] if due is None else [quoted(DAY)]),
        *(
            f"{_label(name, label)} AS {quoted(f'l_{name}')}"
            for name, label in config.labels.items()
        ),
        *(
            filled(quoted(f"c_{name}"), feature.fill, f"c_{name}")
            for name, feature in config.context.items()
        ),
        *(f"{quoted(f'c_{name}')} AS {quoted(f'late_{name}')}" for name in config.late),
    ]
    if config.weight is not None:
        columns.append(f"{_weight(config.weight, config.labels)} AS {quoted(WEIGHT)}")
    required = {f"no label '{name}'": f"l_{name}" for name in config.labels}
    required |= required_features(config, list(config.context))
    if config.weight is not None and config.weight.fill is None:
        required["no weight"] = WEIGHT
    if due is None and config.unripe == "drop" and config.label_window > 0:
        end = one_value(engine, "max(ts)", "unique_events")
        columns.append(f"CASE WHEN ts <= {end - config.label_window} THEN 1 END AS ripe")
        required[UNRIPE] = "ripe"
    if config.drop.max_events_per_user is not None:  # those left out label rows, but are none
        source += " WHERE position IN (SELECT position FROM clean_events)"
    engine.view("labelled", f"SELECT {', '.join(columns)} FROM {source}")
    return required


def required_features(config: EventsConfig, names: list[str]) -> dict[str, str]:
    """Return the columns of features that a sample needs, by reason; else null is an unknown id."""
    return {
        f"no value in '{name}'": f"c_{name}"
        for name in names
        if config.features[name].kind == "dense" or config.vocabulary.kind == "rows"
    }


def _weight(weight: Weight, labels: dict[str, Label]) -> str:
    if weight.column is not None:
        column = quoted(f"c_{weight.column}")
        return column if weight.fill is None else f"coalesce({column}, {weight.fill})"
    cases = {f"{_label(name, labels[name])} = 1": value for name, value in weight.labels.items()}
    cases |= {f"action = {literal(name)}": value for name, value in weight.actions.items()}
    text = " ".join(f"WHEN {test} THEN {value}" for test, value in cases.items())
    rest = "NULL" if weight.fill is None else weight.fill
    return f"CAST(CASE {text} ELSE {rest} END AS DOUBLE)"


def _label(name: str, label: Label) -> str:
    if label.action is not None:
        if label.within is not None:
            return f"coalesce({quoted(f'l_{name}')}, 0)"
        return f"CASE WHEN {actions_in(label.action)} THEN 1 ELSE 0 END"
    column = quoted(f"c_{label.column}")
    if label.at_least is None:
        return column
    return (
        f"CASE WHEN {column} IS NULL THEN NULL WHEN {column} >= {label.at_least} THEN 1 ELSE 0 END"
    )


def is_row(config: EventsConfig) -> str:
    """Return the SQL condition of events that are samples."""
    return actions_in([IMPRESSION] if config.impressions is not None else config.rows)


def _attributed_in_time(engine: SqlEngine, labels: dict[str, Label], config: EventsConfig) -> str:
    """Make the stage of `_attributed` where actions and rows count that arrived by `/end`."""
    columns = ["uid", "iid", *(["request"] if config.by_request else [])]
    same_key = " AND ".join(f"r.{column} = a.{column}" for column in columns)
    tests = {name: actions_in(label.action) for name, label in labels.items()}
    if config.attribute == "last":
        tests["/row"] = is_row(config)
    flags = [f"{test} AS {quoted(f'/is {name}')}" for name, test in tests.items()]
    firsts, decided = [], []
    for name in tests:
        within = duration(labels[name].within or "0s") if name in labels else config.label_window
        firsts.append(
            f"min(CASE WHEN a.{quoted(f'/is {name}')} AND a.ts <= r.ts + {within} THEN a.ts END) "
            f"AS {quoted(f'/at {name}')}"
        )
    for name in labels:
        at, next_row = quoted(f"/at {name}"), quoted("/at /row")
        last = f"coalesce({next_row}, {FOREVER})" if "/row" in tests else str(FOREVER)
        decided.append(f"CASE WHEN {at} <= {last} THEN 1 ELSE 0 END AS {quoted(f'l_{name}')}")
    later = (
        f"SELECT r.position, {', '.join(firsts)} FROM candidates r JOIN (SELECT "
        f"{', '.join(columns)}, ts, arrived, {', '.join(flags)} FROM unique_events WHERE "
        f"{' OR '.join(f'({test})' for test in tests.values())}) a ON {same_key} AND a.ts > r.ts "
        f"AND a.ts <= r.ts + {config.label_window} AND a.arrived < r.{quoted(END)} "
        "GROUP BY r.position"
    )
    engine.add(
        "attributed",
        f"SELECT c.*, {', '.join(decided)} FROM candidates c LEFT JOIN ({later}) l "
        "ON c.position = l.position",
    )
    return "attributed"


def _attributed(engine: SqlEngine, labels: dict[str, Label], config: EventsConfig) -> str:
    """Make a stage of candidates with labels of the first strictly later actions within a time."""
    key = "uid, iid, request" if config.by_request else "uid, iid"
    columns = key.split(", ")
    actions = sorted({action for label in labels.values() for action in label.action or ()})
    acted = f"FROM unique_events WHERE {actions_in(actions)}"
    same_key = " AND ".join(f"c.{column} = a.{column}" for column in columns)
    touches = (
        f"SELECT c.position, {', '.join(f'c.{column}' for column in columns)}, c.ts, "
        f"c.ts AS moment, '' AS action FROM candidates c JOIN (SELECT DISTINCT {key} {acted}) a "
        f"ON {same_key} UNION ALL SELECT position, {key}, ts, NULL AS moment, action {acted}"
    )
    later = (
        f"OVER (PARTITION BY {key} ORDER BY ts RANGE BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)"
    )
    following = {
        f"/at {name}": f"min(CASE WHEN moment IS NULL AND {actions_in(label.action)} THEN ts END)"
        for name, label in labels.items()
    }
    next_row = str(FOREVER)
    if config.attribute == "last":
        following["/next row"] = "min(moment)"
        next_row = f"coalesce({quoted('/next row')}, {FOREVER})"
    times = ", ".join(f"{sql} {later} AS {quoted(name)}" for name, sql in following.items())
    labelled = ", ".join(
        f"CASE WHEN {quoted(f'/at {name}')} <= "
        f"least(ts + {duration(label.within or 'all')}, {next_row}) "
        f"THEN 1 ELSE 0 END AS {quoted(f'l_{name}')}"
        for name, label in labels.items()
    )
    names = ", ".join(f"m.{quoted(f'l_{name}')}" for name in labels)
    engine.add(
        "attributed",
        f"SELECT s.*, {names} FROM candidates s LEFT JOIN (SELECT position, {labelled} FROM "
        f"(SELECT position, ts, moment, {times} FROM ({touches})) WHERE moment IS NOT NULL) m "
        "ON s.position = m.position",
    )
    return "attributed"


def _check_actions(engine: SqlEngine, settings: dict[str, list[str] | None]) -> None:
    table = engine.table("SELECT DISTINCT action FROM unique_events ORDER BY action")
    present = table["action"].to_pylist()
    for setting, actions in settings.items():
        if absent := sorted(set(actions or ()) - set(present)):
            text = f"{setting}: no event has the action {absent}; the log has {present[:20]}"
            if setting.startswith("labels"):
                raise ValueError(f"{text}; correct the name, or leave the label out")
            logger.warning(text)


def _check_weights(engine: SqlEngine, weight: Weight | None) -> None:
    if weight is not None and weight.column is not None:
        least = one_value(engine, f"min({quoted(WEIGHT)})", "labelled")
        if least is not None and least < 0:
            raise ValueError(f"weight: column '{weight.column}' has {least}; a weight is 0 or more")


def _check_given_labels(engine: SqlEngine, labels: dict[str, Label]) -> None:
    for name, label in labels.items():
        if label.column is None or label.at_least is not None:
            continue
        column = quoted(f"l_{name}")
        value = one_value(engine, f"min({column})", f"labelled WHERE {column} NOT IN (0, 1)")
        if value is not None:
            raise ValueError(
                f"labels: '{name}' has the value {value} in column '{label.column}'; write 0 and 1 "
                "or set at_least"
            )
