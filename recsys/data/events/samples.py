"""Make the stage `rows`: impressions, or events that are samples, with labels and splits.

Splits end at lower quantiles of time, so that rows of equal time are in one split.
"""

import logging
import math
from pathlib import PurePosixPath

import numpy as np

from recsys.data.events.settings import IMPRESSION, EventsConfig, Label, Split, Weight
from recsys.data.events.sql import FOREVER, SqlEngine, aligned, filled, listed, literal, quoted
from recsys.data.events.times import duration, moment
from recsys.data.transforms.steps import limits_in_float32

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
BINS = 1 << 14  # bins of a histogram of times
MOMENT = "(ts)"  # SQL of a row's time in conditions
Conditions = dict[str, dict[str, str]]  # dataset -> split -> SQL


def split_conditions(engine: SqlEngine, config: EventsConfig) -> tuple[Conditions, dict[str, int]]:
    """Return SQL conditions by dataset and split, and the number of rows in no split by reason."""
    datasets = _cuts(engine, config)
    conditions = {name: _consecutive_splits(*cuts) for name, cuts in datasets.items()}
    reasons: dict[str, int] = {}
    if config.split.by in ("time", "dates") and len(config.split.at) == 3:
        ends, test = datasets[""]
        if count := engine.count_rows(f"rows WHERE NOT ({test.format(ends[2])})"):
            reasons["after the end of test"] = count
    if not (config.embargo and config.label_window):
        return conditions, reasons
    for dataset, splits in conditions.items():
        ends, test = datasets[dataset]
        for split, following, end in zip(SPLITS[:2], SPLITS[1:], ends, strict=False):
            decided = test.format(end).replace(MOMENT, f"ts + {config.label_window}")
            if config.split.by in ("user", "leave_last"):
                begin = f"{following}_begin"
                decided = f"({begin} IS NULL OR ts + {config.label_window} < {begin})"
            if count := engine.count_rows(f"rows WHERE {splits[split]} AND NOT ({decided})"):
                name = str(PurePosixPath(dataset, split))
                reasons[f"embargo: label of {name} decided after {following} begins"] = count
            splits[split] += f" AND {decided}"
    return conditions, reasons


def _cuts(engine: SqlEngine, config: EventsConfig) -> dict[str, tuple[list[str], str]]:
    """Return by dataset the ends of its splits, and the SQL test that a row is before an end."""
    split = config.split
    if split.by == "windows":
        cuts = {}
        for number in range(1, split.windows + 1):
            tenth = 10 - split.windows + number
            ends = quantiles(engine, [(tenth - 2) / 10, (tenth - 1) / 10, tenth / 10])
            cuts[f"window-{number}"] = ends, f"{MOMENT} <= {{}}"
        return cuts
    if split.by in ("user", "leave_last"):
        return {"": ([*_user_ends(split), "total"], "older <= {}")}
    if split.by == "dates":
        days = [str(moment(str(day), config.time_zone)) for day in split.at]
        return {"": (days, f"{MOMENT} < {{}}")}
    shares = [float(share) for share in split.at]
    ends = quantiles(engine, shares if len(shares) == 3 else [*shares, 1.0])
    return {"": (ends, f"{MOMENT} <= {{}}")}


def _user_ends(split: Split) -> list[str]:
    """Return SQL of the largest `older` (a user's number of older rows) in train and in valid."""
    if split.by == "leave_last":  # few rows fill test first, then one row of train, then valid
        return [f"greatest(total - {count * split.last}, 1) - 1" for count in (2, 1)]
    # A row with m older rows of n is before quantile q if m <= q (n - 1).
    return [f"CAST('{share}' AS DOUBLE) * (total - 1)" for share in split.at[:2]]


def user_columns(rows: str, split: Split) -> str:
    """Return SQL that adds `older`, `total`, `valid_begin` and `test_begin` for a split by user."""
    # With shares, rows of equal time have equal ranks; `leave_last` numbers rows one by one.
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


def _consecutive_splits(ends: list[str], test: str) -> dict[str, str]:
    """Return conditions of consecutive splits; without a third end, test has all later rows."""
    conditions, not_earlier = dict[str, str](), ""
    for number, name in enumerate(SPLITS):
        condition = test.format(ends[number]) if number < len(ends) else "1 = 1"
        conditions[name] = f"{condition}{not_earlier}"
        not_earlier = f" AND NOT ({condition})"
    return conditions


def quantiles(engine: SqlEngine, shares: list[float]) -> list[str]:
    """Return lower quantiles of the rows' times, from histograms that the engine computes."""
    limits = engine.table("SELECT min(ts) AS low, max(ts) AS high, count(*) AS n FROM rows")
    earliest, latest, num_rows = (limits[name][0].as_py() for name in ("low", "high", "n"))
    histograms: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # bins and rows by limits

    def time_at(rank: int) -> int:
        begin, end, num_earlier = earliest, latest, 0  # rows earlier than `begin`
        while begin < end:
            step = (end - begin) // BINS + 1
            if (begin, end) not in histograms:
                table = engine.table(
                    f"SELECT CAST((ts - {begin} - (ts - {begin}) % {step}) / {step} AS BIGINT) AS "
                    f"bin, count(*) AS n FROM rows WHERE ts BETWEEN {begin} AND {end} GROUP BY 1 "
                    "ORDER BY 1"
                )
                histograms[begin, end] = table["bin"].to_numpy(), table["n"].to_numpy()
            bins, counts = histograms[begin, end]
            ends = num_earlier + np.cumsum(counts)
            bin_index = int(np.searchsorted(ends, rank, side="right"))
            num_earlier, number = int(ends[bin_index] - counts[bin_index]), int(bins[bin_index])
            begin, end = begin + number * step, min(end, begin + (number + 1) * step - 1)
        return begin

    ranks = [math.floor(share * (num_rows - 1)) for share in shares]
    return [str(latest if rank == num_rows - 1 else time_at(rank)) for rank in ranks]


WEIGHT = "/weight"  # a column; the / avoids names of the dataset's columns
DAY, END = "/day", "/end"  # columns of due rows: the day on which they are written, and its end
UNRIPE = "unripe: `within` ends after the log"  # reason of rows left out


def actions_in(actions: list[str] | None) -> str:
    """Return an SQL condition on `action`; None: any but impressions."""
    if actions is None:
        return f"action <> '{IMPRESSION}'"
    return f"action IN ({', '.join(map(literal, actions))})"


def make_rows(engine: SqlEngine, config: EventsConfig, is_daily: bool = False) -> dict[str, int]:
    """Make the stage `rows`; return the numbers of rows left out, by reason.

    Its columns are position, uid, iid, ts, labels `l_NAME`, context `c_NAME`, `/weight` and
    `late_NAME`. With `is_daily`, rows come from the stage `due`, which has `/day` and `/end`.
    Otherwise, a log without a usable row is a ValueError, as is an unusable label.
    """
    required = _make_labelled(engine, config, is_daily)
    _check_values(engine, config)
    if not is_daily and not engine.count_rows("labelled"):
        actions = config.rows or "any"
        raise ValueError(f"rows: no event has an action of {actions}; correct the names of actions")
    names = [name for name in engine.schema("labelled").names if name != "ripe"]
    is_complete, reasons = complete_rows(engine, "labelled", required)
    query = f"SELECT {listed(names)} FROM labelled WHERE {is_complete}"
    if not is_daily and config.split.by in ("user", "leave_last"):
        engine.add("rows", user_columns(query, config.split))
    else:
        engine.view("rows", query)
    if not is_daily and not engine.count_rows("rows"):
        fix = "correct these columns"
        if UNRIPE in reasons:
            fix += ", shorten `within`, or set unripe: keep"
        raise ValueError(f"rows: none is left; {reasons} were left out; {fix}")
    return reasons


def complete_rows(
    engine: SqlEngine, stage: str, required: dict[str, str]
) -> tuple[str, dict[str, int]]:
    """Return the SQL condition of rows without null in `required`, and other rows by reason."""
    nulls = {reason: f"{quoted(column)} IS NULL" for reason, column in required.items()}
    if not nulls:
        return "1 = 1", {}
    reasons = engine.count_by_reason(nulls, stage)
    reasons.pop("", None)
    return f"NOT ({' OR '.join(nulls.values())})", reasons


def _make_labelled(engine: SqlEngine, config: EventsConfig, is_daily: bool) -> dict[str, str]:
    """Make the stage `labelled`; return the columns that must not be null, by reason."""
    if not is_daily:
        check_actions(engine, config.actions, "unique_events")
    rows = f"SELECT * FROM unique_events WHERE {is_row(config)}"
    engine.view("candidates", "SELECT * FROM due" if is_daily else rows)
    labels = {name: label for name, label in config.labels.items() if label.action and label.within}
    if labels:
        _make_attributed(engine, labels, config, is_daily)
    source = "attributed" if labels else "candidates"
    columns = {name: name for name in ("position", "uid", "iid", "ts")}
    if is_daily:
        columns[DAY] = quoted(DAY)
    columns |= {f"l_{name}": _label(name, label) for name, label in config.labels.items()}
    for name, feature in config.context.items():
        columns[f"c_{name}"] = filled(quoted(f"c_{name}"), feature.fill)
    columns |= {f"late_{name}": quoted(f"c_{name}") for name in config.late}
    if config.weight is not None:
        columns[WEIGHT] = _weight(config.weight, config.labels)
    required = {f"no label '{name}'": f"l_{name}" for name in config.labels}
    required |= required_features(config, list(config.context))
    if config.weight is not None and config.weight.fill is None:
        required["no weight"] = WEIGHT
    if not is_daily and config.ripe_after:
        end = engine.value("max(ts)", "unique_events")
        columns["ripe"] = f"CASE WHEN ts <= {end - config.ripe_after} THEN 1 END"
        required[UNRIPE] = "ripe"
    if config.drop.max_events_per_user is not None:  # dropped events label rows, but are no rows
        source += " WHERE position IN (SELECT position FROM clean_events)"
    engine.view("labelled", f"SELECT {aligned(columns, columns)} FROM {source}")
    return required


def required_features(config: EventsConfig, names: list[str]) -> dict[str, str]:
    """Return feature columns that must not be null, by reason; other nulls are unknown ids."""
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
    default = "NULL" if weight.fill is None else weight.fill
    return f"CAST(CASE {text} ELSE {default} END AS DOUBLE)"


def _label(name: str, label: Label) -> str:
    if label.action is not None:
        if label.within is not None:
            return f"coalesce({quoted(f'l_{name}')}, 0)"
        return f"CASE WHEN {actions_in(label.action)} THEN 1 ELSE 0 END"
    column = quoted(f"c_{label.column}")
    if label.at_least is None:
        return column
    limit = limits_in_float32(np.array(label.at_least, np.float64))  # a column may be float32
    return f"CASE WHEN {column} >= {limit} THEN 1 WHEN {column} IS NOT NULL THEN 0 END"


def is_row(config: EventsConfig) -> str:
    """Return the SQL condition of events that are samples."""
    return actions_in([IMPRESSION] if config.impressions is not None else config.rows)


def _make_attributed(
    engine: SqlEngine, labels: dict[str, Label], config: EventsConfig, is_daily: bool
) -> None:
    """Make the stage `attributed`: candidates with labels of strictly later actions in time."""
    key = ["uid", "iid", *(["request"] if config.by_request else [])]
    first_actions = _first_actions_in_time if is_daily else _first_actions
    next_row = str(FOREVER)
    if config.attribute == "last":
        next_row = f"coalesce({quoted('/at /row')}, {FOREVER})"
    decided = ", ".join(
        f"CASE WHEN {quoted(f'/at {name}')} <= "
        f"least(ts + {duration(label.within or 'all')}, {next_row}) "
        f"THEN 1 ELSE 0 END AS {quoted(f'l_{name}')}"
        for name, label in labels.items()
    )
    names = ", ".join(f"l.{quoted(f'l_{name}')}" for name in labels)
    engine.add(
        "attributed",
        f"SELECT c.*, {names} FROM candidates c LEFT JOIN (SELECT position, {decided} FROM "
        f"({first_actions(config, labels, key)})) l ON c.position = l.position",
    )


def _first_actions_in_time(config: EventsConfig, labels: dict[str, Label], key: list[str]) -> str:
    """Return SQL as `_first_actions`, with only actions and rows that arrived before `/end`."""
    same_key = " AND ".join(f"r.{column} = a.{column}" for column in key)
    tests = {name: actions_in(label.action) for name, label in labels.items()}
    if config.attribute == "last":
        tests["/row"] = is_row(config)
    flags = [f"{test} AS {quoted(f'/is {name}')}" for name, test in tests.items()]
    firsts = []
    for name in tests:
        within = duration(labels[name].within or "0s") if name in labels else config.label_window
        firsts.append(
            f"min(CASE WHEN a.{quoted(f'/is {name}')} AND a.ts <= r.ts + {within} THEN a.ts END) "
            f"AS {quoted(f'/at {name}')}"
        )
    return (
        f"SELECT r.position, r.ts, {', '.join(firsts)} FROM candidates r JOIN (SELECT "
        f"{', '.join(key)}, ts, arrived, {', '.join(flags)} FROM unique_events WHERE "
        f"{' OR '.join(f'({test})' for test in tests.values())}) a ON {same_key} AND a.ts > r.ts "
        f"AND a.ts <= r.ts + {config.label_window} AND a.arrived < r.{quoted(END)} "
        "GROUP BY r.position, r.ts"
    )


def _first_actions(config: EventsConfig, labels: dict[str, Label], key: list[str]) -> str:
    """Return SQL of candidates with the times of the next actions, `/at NAME`, and `/at /row`."""
    columns = ", ".join(key)
    actions = sorted({action for label in labels.values() for action in label.action or ()})
    acted = f"FROM unique_events WHERE {actions_in(actions)}"
    same_key = " AND ".join(f"c.{column} = a.{column}" for column in key)
    touches = (
        f"SELECT c.position, {', '.join(f'c.{column}' for column in key)}, c.ts, c.ts AS moment, "
        f"'' AS action FROM candidates c JOIN (SELECT DISTINCT {columns} {acted}) a ON {same_key} "
        f"UNION ALL SELECT position, {columns}, ts, NULL AS moment, action {acted}"
    )
    later = f"PARTITION BY {columns} ORDER BY ts RANGE BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING"
    following = {
        f"/at {name}": f"min(CASE WHEN moment IS NULL AND {actions_in(label.action)} THEN ts END)"
        for name, label in labels.items()
    }
    if config.attribute == "last":
        following["/at /row"] = "min(moment)"
    times = ", ".join(f"{sql} OVER ({later}) AS {quoted(at)}" for at, sql in following.items())
    return (
        f"SELECT * FROM (SELECT position, ts, moment, {times} FROM ({touches})) "
        "WHERE moment IS NOT NULL"
    )


def check_actions(
    engine: SqlEngine, settings: dict[str, list[str] | None], events: str, may_come: bool = False
) -> None:
    """Log a warning for actions of settings that no event in the stage `events` has.

    A label's missing action is a ValueError, unless later events `may_come`.
    """
    table = engine.table(f"SELECT DISTINCT action FROM {events} ORDER BY action")
    log_actions = table["action"].to_pylist()
    for setting, actions in settings.items():
        if absent := sorted(set(actions or ()) - set(log_actions)):
            text = f"{setting}: no event has the action {absent}; the log has {log_actions[:20]}"
            if setting.startswith("labels") and not may_come:
                raise ValueError(f"{text}; correct the name, or leave the label out")
            logger.warning(text)


def _check_values(engine: SqlEngine, config: EventsConfig) -> None:
    """Raise a ValueError for a label other than 0 and 1 in a column, or a weight below 0."""
    for name, label in config.labels.items():
        if label.column is None or label.at_least is not None:
            continue
        column = quoted(f"l_{name}")
        value = engine.value(f"min({column})", f"labelled WHERE {column} NOT IN (0, 1)")
        if value is not None:
            raise ValueError(
                f"labels: '{name}' has the value {value} in column '{label.column}'; write 0 and 1 "
                "or set at_least"
            )
    weight = config.weight
    if weight is not None and weight.column is not None:
        value = engine.value(f"min({quoted(WEIGHT)})", "labelled")
        if value is not None and value < 0:
            raise ValueError(f"weight: column '{weight.column}' has {value}; a weight is 0 or more")
