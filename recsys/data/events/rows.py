"""Makes the stage `rows`: impressions, or the events that are samples, with their labels."""

from __future__ import annotations

import logging

import pyarrow as pa

from recsys.data.events.engines.base import Engine
from recsys.data.events.settings import EventsConfig, Label
from recsys.data.events.signals import IMPRESSION, count_rows, filled, literal, quoted
from recsys.data.events.times import duration

logger = logging.getLogger(__name__)


def actions_in(actions: list[str] | None) -> str:
    """Return an SQL condition on `action`; None: any but impressions."""
    if actions is None:
        return f"action <> '{IMPRESSION}'"
    return f"action IN ({', '.join(map(literal, actions))})"


def make_rows(
    engine: Engine, config: EventsConfig, types: dict[str, pa.DataType]
) -> dict[str, int]:
    """Make the stage `rows`: position, uid, iid, ts, labels `l_NAME`, context `c_NAME`.

    With a split by user, `older` and `total` count the user's earlier rows and all of them.

    Returns:
        The number of rows left out, by reason.

    Raises:
        ValueError: no row is left, a given label is neither 0 nor 1, or no event has a label's
            action.
    """
    _check_actions(engine, config)
    chosen = [IMPRESSION] if config.impressions is not None else config.rows
    engine.view("candidates", f"SELECT * FROM signals WHERE {actions_in(chosen)}")
    attributed = {name: of for name, of in config.labels.items() if of.action and of.within}
    source = _attributed(engine, attributed, "request" in types) if attributed else "candidates"
    labels = {name: _label(name, label) for name, label in config.labels.items()}
    context = {f"c_{name}": feature for name, feature in config.context.items()}
    selected = [
        "position, uid, iid, ts",
        *(f"{sql} AS {quoted(f'l_{name}')}" for name, sql in labels.items()),
        *(filled(quoted(column), of.fill, column) for column, of in context.items()),
    ]
    engine.view("labelled", f"SELECT {', '.join(selected)} FROM {source}")
    _check_given_labels(engine, config)
    needed = {f"no label '{name}'": f"l_{name}" for name in labels}
    needed |= {
        f"no value in '{column[2:]}'": column
        for column, feature in context.items()
        if is_needed(config, feature.kind)
    }
    older = ""
    if config.split.by == "user":
        older = (
            ", rank() OVER (PARTITION BY uid ORDER BY ts) - 1 AS older"
            ", count(*) OVER (PARTITION BY uid) AS total"
        )
    reasons = count_nulls(engine, "labelled", needed)
    kept = " AND ".join(f"{quoted(column)} IS NOT NULL" for column in needed.values())
    make = engine.add if older else engine.view
    make("rows", f"SELECT *{older} FROM labelled WHERE {kept}")
    if not count_rows(engine, "rows"):
        raise ValueError(f"rows: none is left; {reasons} were left out; correct these columns")
    return reasons


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


def _attributed(engine: Engine, labels: dict[str, Label], by_request: bool) -> str:
    """Make a stage of the candidates with labels of actions that follow within a time.

    An action belongs to the last moment at which its user had a candidate with its item.
    """
    key = "uid, iid, request" if by_request else "uid, iid"
    wanted = sorted({action for label in labels.values() for action in label.action or ()})
    columns = key.split(", ")
    acted = f"FROM signals WHERE {actions_in(wanted)}"
    same = " AND ".join(f"c.{column} = a.{column}" for column in columns)
    touches = (
        f"SELECT {', '.join(f'c.{column}' for column in columns)}, ts, ts AS moment, '' AS action, "
        f"0 AS later FROM candidates c JOIN (SELECT DISTINCT {key} {acted}) a ON {same} UNION ALL "
        f"SELECT {key}, ts, NULL AS moment, action, 1 AS later {acted}"
    )
    last = (
        f"SELECT {key}, ts, action, later, max(moment) OVER (PARTITION BY {key} "
        "ORDER BY ts, later ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS moment "
        f"FROM ({touches})"
    )
    done = [
        f"max(CASE WHEN {actions_in(label.action)} AND ts - moment <= {duration(label.within)} "
        f"THEN 1 ELSE 0 END) AS {quoted(f'l_{name}')}"
        for name, label in labels.items()
        if label.within is not None
    ]
    matches = (
        f"SELECT {key}, moment, {', '.join(done)} FROM ({last}) "
        f"WHERE later = 1 AND moment IS NOT NULL GROUP BY {key}, moment"
    )
    names = ", ".join(f"m.{quoted(f'l_{name}')}" for name in labels)
    joined = " AND ".join(f"s.{column} = m.{column}" for column in columns)
    engine.add(
        "attributed",
        f"SELECT s.*, {names} FROM candidates s LEFT JOIN ({matches}) m "
        f"ON {joined} AND s.ts = m.moment",
    )
    return "attributed"


def _check_actions(engine: Engine, config: EventsConfig) -> None:
    """Raise a ValueError for a label of an action that no event has; warn of other such actions."""
    found = set(engine.table("SELECT DISTINCT action FROM signals")["action"].to_pylist())
    named = {f"labels.{name}": label.action for name, label in config.labels.items()}
    used = {f"histories.{name}": of.actions for name, of in config.histories.items()}
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
