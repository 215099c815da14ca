"""Checks the names of a dataset's columns, before any log is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recsys.config.parser import short
from recsys.data.events.settings import EventsConfig
from recsys.data.events.signals import event_columns
from recsys.data.schema_columns import RAW_GROUP, ROW_POSITION, table_name_problem

LONGEST_NAME = 200  # bytes of a column's name, which may be that of a file, too


def column_names(config: EventsConfig) -> list[str]:
    """Return the names of the columns that the splits of a dataset have."""
    tables = [table.columns for table in (config.items, config.users) if table is not None]
    groups: list[Mapping[str, Any]]
    groups = [config.context, *tables, config.labels, config.counts, config.histories]
    groups += [history.parallel for history in config.histories.values()]
    names = [config.output.user, config.output.item, config.output.time]
    names += [config.output.sampled] if config.negatives is not None else []
    return names + [name for group in groups for name in group]


def check_names(config: EventsConfig) -> None:
    """Require that columns of the dataset have distinct names."""
    names = column_names(config)
    for name in names:
        if not name:
            raise ValueError("a column of the dataset has an empty name; name it")
        if name in (ROW_POSITION, RAW_GROUP):
            raise ValueError(f"'{name}' is a name of this program's; rename the column")
        if "/" in name or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            raise ValueError(
                f"{short(repr(name))} names a column of the dataset, and maybe a file; write up to "
                f"{LONGEST_NAME} bytes of printable characters without /"
            )
        if names.count(name) > 1:
            raise ValueError(f"'{name}' names two columns of the dataset; rename one")
    contents = config.items.content if config.items is not None else {}
    if wrong := [name for name in ("", config.output.item) if name in contents]:
        raise ValueError(f"items.content: '{wrong[0]}' is no name, or that of the ids; rename it")
    every = dict.fromkeys([*names, *event_columns(config), *contents])
    alike: dict[str, str] = {}
    for name in every:
        if (other := alike.setdefault(name.lower(), name)) != name:
            raise ValueError(
                f"'{other}' and '{name}' differ in capitals alone, which SQL does not tell apart; "
                "rename one"
            )
    _check_tables(config)


def _check_tables(config: EventsConfig) -> None:
    """Check the names of columns with a table of ids, and the counts that their ids need."""
    ids = [config.output.user, config.output.item]
    ids += [name for name, feature in config.features.items() if feature.kind != "dense"]
    beside = [pair for of in config.histories.values() for pair in of.parallel.items()]
    actions = [name for name, of in beside if of.column == "action"]
    lists = [name for name, of in beside if of.column in (*ids, "action")]
    made = [name for name, column in config.transforms.items() if column.kind != "dense"]
    for name in (*ids, *lists, *made):
        if (problem := table_name_problem(name)) is not None:
            raise ValueError(f"'{name}' names a table of ids, and {problem}")
    for name, count in config.vocabulary.min_count.items():
        if name not in (*ids, *actions):
            raise ValueError(
                f"vocabulary: min_count of '{name}', which is none of the id columns "
                f"{[*ids, *actions]}"
            )
        if count < 1:
            raise ValueError(f"vocabulary: min_count of '{name}' is {count}; set at least 1")
    if config.vocabulary.min_count and config.vocabulary.kind == "rows":
        raise ValueError(
            "vocabulary: min_count is of kind exact alone; remove it, or set that kind"
        )
