"""Checks that the settings of an `events.yaml` fit together, before any log is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np

from recsys.data.events.files.columns import LARGEST
from recsys.data.events.output.names import check_names, column_names
from recsys.data.events.settings import EventsConfig, Source
from recsys.data.events.signals import IMPRESSION, event_columns, literal
from recsys.data.events.times import duration, moment
from recsys.data.schema_columns import Column, check_vocabulary
from recsys.data.transforms.chain import KINDS, chains_of, file_columns


def check_events_config(config: EventsConfig) -> None:
    """Raise a ValueError where settings do not fit together."""
    for required in ("events", "labels"):
        if not getattr(config, required):
            raise ValueError(f"{required} is empty; name at least one")
    if IMPRESSION in config.events:
        raise ValueError(
            f"events: '{IMPRESSION}' is the name of the action of impressions; rename the table"
        )
    for name, source in sources(config):
        if not source.path:
            raise ValueError("path: empty; name at least one file or folder")
        delimiter = "," if source.delimiter is None else source.delimiter
        if len(delimiter.encode()) != 1 or delimiter in '"\r\n\0':
            raise ValueError(
                f"delimiter {delimiter!r}: write one ASCII character, and no quote or end of a line"
            )
        several = getattr(source, "several", None)
        if several is not None and not (several.between and several.separator):
            raise ValueError(f"{name}.several: between and separator are texts; write some")
        try:
            ZoneInfo(source.time_zone)
        except Exception as error:
            raise ValueError(
                f"{name}.time_zone '{source.time_zone}' is unknown; write such as Europe/Berlin"
            ) from error
    check_names(config)
    _check_transforms(config)
    _check_columns(config)
    _check_labels(config)
    _check_requests(config)
    _check_past(config)
    _check_split(config)
    if (events := config.drop.max_events_per_user) is not None and events < 1:
        raise ValueError(f"drop: max_events_per_user is {events}; set at least 1")
    if config.drop.later_than is not None:
        moment(config.drop.later_than, config.time_zone)
    if config.rows is not None and config.impressions is not None:
        raise ValueError("rows: impressions are the rows already; remove rows or impressions")
    if config.negatives is not None:
        if config.impressions is not None:
            raise ValueError("negatives: impressions have negatives already; take one of both out")
        for name, least, most in (("per_positive", 1, 10_000), ("seed", 0, 2**43 - 1)):
            if not least <= (value := getattr(config.negatives, name)) <= most:
                raise ValueError(f"negatives: {name} is {value}; set {least} to {most}")


def _check_transforms(config: EventsConfig) -> None:
    """Check what `schema.yaml` will say of columns that are made of others."""
    names = column_names(config)
    for name, column in config.transforms.items():
        where = f"transforms: '{name}'"
        if name in names and name not in config.features:
            raise ValueError(f"{where} names a column that is no feature; rename it")
        if column.kind not in KINDS:
            raise ValueError(f"{where} is of kind {column.kind}; choose one of {KINDS}")
        if column.kind != "dense" and (column.num_embeddings or 0) < 1:
            raise ValueError(f"{where}: num_embeddings is {column.num_embeddings}; set its rows")
        if column.vocabulary is not None:
            check_vocabulary(column, where, is_target=False)
            if column.vocabulary.kind == "exact":
                raise ValueError(f"{where}: a vocabulary of kind exact is of ids alone; use hash")
    columns = {name: Column("label") for name in config.labels} | config.transforms
    chains = chains_of(columns, config.output.item, "transforms")
    if len(chains) < len(config.transforms):
        without = next(name for name in config.transforms if name not in chains)
        raise ValueError(f"transforms: '{without}' has neither column nor transform; add one")
    for name in file_columns(chains, chains):
        if name not in names:
            raise ValueError(f"transforms: the dataset has no column '{name}', but {names}")


def _check_columns(config: EventsConfig) -> None:
    """Require that a table declares each column that something uses."""
    for source, events in config.events.items():
        if twice := [name for name in events.columns if events.columns.count(name) > 1]:
            raise ValueError(f"events: columns of '{source}' name '{twice[0]}' twice; remove one")
    rows = config.events.values() if config.impressions is None else [config.impressions]
    of_rows = {name for table in rows for name in table.columns}
    of_events = {name for table in config.events.values() for name in table.columns}
    wanted = dict.fromkeys(config.context, "context")
    wanted |= {label.column: "labels" for label in config.labels.values() if label.column}
    for name, user in wanted.items():
        if name not in of_rows:
            raise ValueError(
                f"{user}: column '{name}' is not in the `columns` of a table of rows; add it there"
            )
    listed = {of.column for each in config.histories.values() for of in each.parallel.values()}
    own = {"age", "action", *(config.items.columns if config.items is not None else ())}
    if several := sorted(listed & own & of_events):
        raise ValueError(
            f"parallel: '{several[0]}' is a column of events, and of items or made for each event; "
            "rename it in the file, or leave it out of `columns`"
        )
    for name in event_columns(config):
        if name not in wanted and name not in of_events:
            raise ValueError(
                f"parallel: column '{name}' is not in the `columns` of an event or item table; add "
                "it there"
            )


def _check_labels(config: EventsConfig) -> None:
    for name, label in config.labels.items():
        if (label.action is None) == (label.column is None):
            raise ValueError(f"labels: '{name}' needs one of action and column; set exactly one")
        if label.within is not None and label.action is None:
            raise ValueError(f"labels: '{name}' of a column has no within; remove it")
        if label.at_least is not None and label.column is None:
            raise ValueError(f"labels: '{name}' of an action has no at_least; remove it")
        if label.column in config.context and config.context[label.column].kind != "dense":
            raise ValueError(
                f"labels: '{name}': column '{label.column}' has ids; name one of numbers"
            )
        if label.within is not None and not duration(label.within):
            raise ValueError(
                f"labels: '{name}': within is {label.within}; set a duration such as 7d"
            )
        if label.action is not None and label.within is None and config.impressions is not None:
            raise ValueError(f"labels: '{name}' of impressions has no within; set one such as 7d")
        if label.at_least is not None and not math.isfinite(label.at_least):
            raise ValueError(f"labels: '{name}': at_least is {label.at_least}; set a finite number")


def _check_requests(config: EventsConfig) -> None:
    """Require a request column in all tables of rows and of actions that label them, or in none."""
    actions = {
        name for label in config.labels.values() if label.within for name in label.action or ()
    }
    if config.impressions is None:
        actions |= set(config.events if config.rows is None else config.rows)
    tables = {
        f"events.{name}": table
        for name, table in config.events.items()
        if table.action is not None or name in actions
    }
    if config.impressions is not None:
        tables["impressions"] = config.impressions
    without = [name for name, table in tables.items() if table.request is None]
    if config.by_request and without and actions:
        raise ValueError(
            f"{without[0]} has no `request`, but other tables have one, and a row and the actions "
            "that label it agree in it; name its column, or leave `request` out everywhere"
        )


def _check_past(config: EventsConfig) -> None:
    chosen = {f"histories: '{name}': actions": of.actions for name, of in config.histories.items()}
    chosen |= {f"counts: '{name}': actions": of.actions for name, of in config.counts.items()}
    chosen |= {f"counts: '{name}': per": of.per for name, of in config.counts.items()}
    chosen |= {f"labels: '{name}': action": of.action for name, of in config.labels.items()}
    for where, actions in (chosen | {"rows": config.rows}).items():
        if actions == []:
            raise ValueError(f"{where} is empty; name an action, or leave it out")
        for action in actions or ():
            literal(action)
    for name, history in config.histories.items():
        _check_delay(f"histories: '{name}'", history.delay)
        if history.length < 1:
            raise ValueError(f"histories: '{name}': length is {history.length}; set at least 1")
        for parallel, of in history.parallel.items():
            numbers = (of.scale, of.fill, 0.0 if of.at_least is None else of.at_least)
            if not np.float32(of.scale) or not all(abs(number) <= LARGEST for number in numbers):
                raise ValueError(
                    f"parallel: '{parallel}': scale {of.scale}, fill {of.fill}, at_least "
                    f"{of.at_least}; set numbers that float32 holds, and scale other than 0"
                )
            kind = _parallel_kind(config, of.column)
            if kind == "ids":
                raise ValueError(
                    f"parallel: '{parallel}': column '{of.column}' has lists of ids, and an event "
                    "one value; name a column of kind id or of numbers"
                )
            if kind != "number" and (of.scale, of.fill, of.at_least) != (1.0, 0.0, None):
                raise ValueError(
                    f"parallel: '{parallel}': scale, fill and at_least are of numbers, and "
                    f"'{of.column}' has none; remove them"
                )
            if of.column == "action" and config.vocabulary.kind == "rows":
                raise ValueError(
                    f"parallel: '{parallel}': actions cannot be rows of a table; leave it out"
                )
    ids = config.items.columns if config.items is not None else {}
    for name, count in config.counts.items():
        _check_delay(f"counts: '{name}'", count.delay)
        if duration(count.within) == 0:
            raise ValueError(f"counts: '{name}': within is {count.within}, which holds no event")
        for key in count.of:
            if key not in ("user", "item") and not (key in ids and ids[key].kind == "id"):
                raise ValueError(
                    f"counts: '{name}': of has '{key}'; name user, item or an id column of items"
                )
        if not count.of:
            raise ValueError(f"counts: '{name}': of is empty; name user, item or both")


def _parallel_kind(config: EventsConfig, column: str) -> str:
    """Return what a list beside a history has: id, ids, age, action or number."""
    if column in ("age", "action"):
        return column
    features = {**config.context, **(config.items.columns if config.items is not None else {})}
    kind = features[column].kind if column in features else "dense"
    return "number" if kind == "dense" else kind


def _check_delay(where: str, delay: str) -> None:
    if duration(delay) is None:
        raise ValueError(f"{where}: delay is {delay}; write a duration such as 1h")


def _check_split(config: EventsConfig) -> None:
    split = config.split
    if split.by == "windows":
        if not 1 <= split.windows <= 8:
            raise ValueError(f"split: windows is {split.windows}; set 1 to 8")
        return
    if not 2 <= len(split.at) <= (2 if split.by == "user" else 3):
        raise ValueError(
            f"split: at has {len(split.at)} values; write the two at which train and valid end"
        )
    if split.by == "dates":
        cuts: list[float] = [moment(str(day), config.time_zone) for day in split.at]
    else:
        if not all(isinstance(share, float | int) and 0 < share <= 1 for share in split.at):
            raise ValueError(f"split: at is {split.at}; write shares between 0 and 1")
        cuts = [float(share) for share in split.at]
    if any(late <= early for early, late in pairwise(cuts)):
        raise ValueError(f"split: at is {split.at}; write it in ascending order")


def sources(config: EventsConfig) -> Iterator[tuple[str, Source]]:
    """Yield each table with the name of its setting."""
    yield from ((f"events.{name}", table) for name, table in config.events.items())
    for name in ("impressions", "items", "users"):
        if (table := getattr(config, name)) is not None:
            yield name, table
