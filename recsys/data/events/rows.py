"""Makes the stage `rows`: impressions, or the events that are samples, with their labels."""

from __future__ import annotations

import logging

from recsys.data.events.engines.base import Engine
from recsys.data.events.settings import EventsConfig, Label
from recsys.data.events.signals import FOREVER, IMPRESSION, count_rows, filled, literal, quoted
from recsys.data.events.splits import user_columns
from recsys.data.events.times import duration

logger = logging.getLogger(__name__)

UNRIPE = "unripe: `within` ends after the log"  # reason of rows left out


def actions_in(actions: list[str] | None) -> str:
    """Return an SQL condition on `action`; None: any but impressions."""
    if actions is None:
        return f"action <> '{IMPRESSION}'"
    return f"action IN ({', '.join(map(literal, actions))})"


def make_rows(engine: Engine, config: EventsConfig) -> dict[str, int]:
    """Make the stage `rows`: position, uid, iid, ts, labels `l_NAME`, context `c_NAME`.

    With a split by user, there are further columns; see `user_columns`.

    Returns:
        The number of rows left out, by reason.

    Raises:
        ValueError: no row is left, a given label is neither 0 nor 1, or no event has a label's
            action.
    """
    needed = _make_labelled(engine, config)
    _check_given_labels(engine, config)
    reasons = count_nulls(engine, "labelled", needed)
    complete = " AND ".join(f"{quoted(column)} IS NOT NULL" for column in needed.values())
    names = engine.table("SELECT * FROM labelled LIMIT 0").schema.names
    columns = ", ".join(quoted(name) for name in names if name != "ripe")
    query = f"SELECT {columns} FROM labelled WHERE {complete}"
    if config.split.by == "user":
        engine.add("rows", user_columns(query, config))
    else:
        engine.view("rows", query)
    if not count_rows(engine, "rows"):
        fix = "correct these columns"
        if UNRIPE in reasons:
            fix += ", shorten `within`, or set unripe: keep"
        raise ValueError(f"rows: none is left; {reasons} were left out; {fix}")
    return reasons


def _make_labelled(engine: Engine, config: EventsConfig) -> dict[str, str]:
    """Make the stage `labelled` of all rows; return the columns that a sample needs, by reason."""
    _check_actions(engine, config)
    chosen = [IMPRESSION] if config.impressions is not None else config.rows
    engine.view("candidates", f"SELECT * FROM signals_once WHERE {actions_in(chosen)}")
    attributed = {name: of for name, of in config.labels.items() if of.action and of.within}
    source = _attributed(engine, attributed, config) if attributed else "candidates"
    labels = {name: _label(name, label) for name, label in config.labels.items()}
    context = {f"c_{name}": feature for name, feature in config.context.items()}
    selected = [
        "position, uid, iid, ts",
        *(f"{sql} AS {quoted(f'l_{name}')}" for name, sql in labels.items()),
        *(filled(quoted(column), of.fill, column) for column, of in context.items()),
    ]
    drops_unripe = config.unripe == "drop" and config.label_window > 0
    if drops_unripe:
        end = engine.table("SELECT max(ts) AS ts FROM signals_once")["ts"][0].as_py()
        selected.append(f"CASE WHEN ts <= {end - config.label_window} THEN 1 END AS ripe")
    if config.drop.max_events_per_user is not None:  # those left out label rows, but are none
        source += " WHERE position IN (SELECT position FROM signals)"
    engine.view("labelled", f"SELECT {', '.join(selected)} FROM {source}")
    needed = {f"no label '{name}'": f"l_{name}" for name in labels}
    needed |= {
        f"no value in '{column[2:]}'": column
        for column, feature in context.items()
        if is_needed(config, feature.kind)
    }
    if drops_unripe:
        needed[UNRIPE] = "ripe"
    return needed


def is_needed(config: EventsConfig, kind: str) -> bool:
    """Return whether a sample needs a value of a feature; else null is an unknown id."""
    return kind == "dense" or config.vocabulary.kind == "rows"


def count_nulls(engine: Engine, stage: str, columns: dict[str, str]) -> dict[str, int]:
    """Return how many rows lack a value, by reason; a row counts for the first column."""
    if not columns:
        return {}
    cases = " ".join(
        f"WHEN {quoted(column)} IS NULL THEN {number}"
        for number, column in enumerate(columns.values())
    )
    table = engine.table(f"SELECT CASE {cases} END AS r, count(*) AS n FROM {stage} GROUP BY 1")
    names = list(columns)
    pairs = zip(table["r"].to_pylist(), table["n"].to_pylist(), strict=True)
    return {names[number]: count for number, count in pairs if number is not None}


def _label(name: str, label: Label) -> str:
    """Return SQL of a label: 0, 1 or null."""
    if label.action is not None:
        if label.within is not None:
            return f"coalesce({quoted(f'l_{name}')}, 0)"
        return f"CASE WHEN {actions_in(label.action)} THEN 1 ELSE 0 END"
    assert label.column is not None
    column = quoted(f"c_{label.column}")
    if label.at_least is None:
        return column
    return (
        f"CASE WHEN {column} IS NULL THEN NULL WHEN {column} >= {label.at_least} THEN 1 ELSE 0 END"
    )


def _attributed(engine: Engine, labels: dict[str, Label], config: EventsConfig) -> str:
    """Make a stage of the candidates with labels of actions that follow within a time.

    An action follows a row if it is strictly later, so that no row labels itself. The first one
    decides: with `attribute: last`, those after the next row with the user and item belong to that.
    """
    key = "uid, iid, request" if config.by_request else "uid, iid"
    columns = key.split(", ")
    actions = sorted({action for label in labels.values() for action in label.action or ()})
    acted = f"FROM signals_once WHERE {actions_in(actions)}"
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


def _check_actions(engine: Engine, config: EventsConfig) -> None:
    """Raise a ValueError for a label of an action that no event has; warn of other such actions."""
    found = set(engine.table("SELECT DISTINCT action FROM signals_once")["action"].to_pylist())
    named = {f"labels.{name}": label.action for name, label in config.labels.items()}
    used = {"rows": config.rows}
    used |= {f"histories.{name}": of.actions for name, of in config.histories.items()}
    used |= {f"counts.{name}": of.actions for name, of in config.counts.items()}
    used |= {f"counts.{name}.per": of.per for name, of in config.counts.items()}
    for name, actions in (named | used).items():
        if absent := sorted(set(actions or ()) - found):
            words = f"{name}: no event has the action {absent}; the log has {sorted(found)[:20]}"
            if name in named:
                raise ValueError(f"{words}; correct the name, or leave the label out")
            logger.warning(words)


def _check_given_labels(engine: Engine, config: EventsConfig) -> None:
    """Raise a ValueError for a label that is given as neither 0 nor 1, or if nothing is left."""
    for name, label in config.labels.items():
        if label.column is None or label.at_least is not None:
            continue
        column = quoted(f"l_{name}")
        wrong = engine.table(
            f"SELECT min({column}) AS value FROM labelled WHERE {column} NOT IN (0, 1)"
        )["value"][0].as_py()
        if wrong is not None:
            raise ValueError(
                f"labels: '{name}' has the value {wrong} in column '{label.column}'; write 0 and 1 "
                "or set at_least"
            )
    if not count_rows(engine, "labelled"):
        wanted = config.rows or "any"
        raise ValueError(f"rows: no event has an action of {wanted}; correct the names of actions")
