"""Writes the last known features of items, users and other ids, which requests are scored with.

Columns of snapshots are those that are valid when the dataset is made; counts are those of a sample
right after the last event.
"""

from __future__ import annotations

from pathlib import Path

from recsys.data.events.histories import event_key, make_counts
from recsys.data.events.settings import Count, EventsConfig, Snapshots
from recsys.data.events.sql import SqlEngine, filled, one_value, quoted
from recsys.data.events.times import latest_moment
from recsys.data.schema_columns import FeatureTable


def feature_tables(config: EventsConfig) -> list[FeatureTable]:
    """Return the tables of the features of ids: all but those of the sample's own row."""
    return [
        FeatureTable(
            [_output_key(config, name) for name in keys],
            [*(table.columns if table is not None else ()), *counts],
            {name: count.max_age for name, count in counts.items()},
            _beside(config) if keys == ("item",) else {},
        )
        for keys, (table, counts) in _sources(config).items()
    ]


def _beside(config: EventsConfig) -> dict[str, str]:
    """Return the lists beside histories that are columns of items which never change, as stored."""
    if config.items is None or config.items.valid_from is not None:
        return {}
    return {
        name: parallel.column
        for name, parallel in config.parallels.items()
        if parallel.column in config.items.columns and parallel.is_as_stored
    }


def write_last_features(engine: SqlEngine, config: EventsConfig, folder: Path) -> None:
    """Write `folder/NAME` of each table: a row per id, and the time of each count beside it."""
    time = 1 + one_value(engine, f"max({config.arrival})", "clean_events")
    sources = _sources(config)
    for number, (table, (keys, (snapshots, counts))) in enumerate(
        zip(feature_tables(config), sources.items())
    ):
        stage = f"last_counts_{number}"
        if counts:
            columns = {event_key(name): quoted(event_key(name)) for name in keys}
            samples = (
                f"(SELECT DISTINCT {', '.join(columns.values())}, 0 AS position, "
                f"CAST({time} AS BIGINT) AS ts FROM past_events)"
            )
            make_counts(engine, stage, samples, columns, counts, list(columns))
        query = _query(config, keys, snapshots, counts, stage, time)
        order = ", ".join(quoted(name) for name in table.by)
        engine.write(f"{query} ORDER BY {order}", folder / table.name)


def _sources(
    config: EventsConfig,
) -> dict[tuple[str, ...], tuple[Snapshots | None, dict[str, Count]]]:
    """Return, by names as in `of` of a count, the snapshots and counts of ids that have some."""
    snapshots = {("item",): config.items, ("user",): config.users}
    sources: dict[tuple[str, ...], tuple[Snapshots | None, dict[str, Count]]] = {
        keys: (table, {})
        for keys, table in snapshots.items()
        if table is not None and table.columns
    }
    for name, count in config.counts.items():
        sources.setdefault(tuple(dict.fromkeys(count.of)), (None, {}))[1][name] = count
    return sources


def _output_key(config: EventsConfig, name: str) -> str:
    return {"item": config.output.item, "user": config.output.user}.get(name, name)


def _query(
    config: EventsConfig,
    keys: tuple[str, ...],
    snapshots: Snapshots | None,
    counts: dict[str, Count],
    stage: str,
    time: int,
) -> str:
    """Return SQL of the rows of a table; counts of 0 alone are left out, as nothing is 0 too."""
    ids = [quoted(event_key(name)) for name in keys]
    columns = [f"k.{key} AS {quoted(_output_key(config, name))}" for key, name in zip(ids, keys)]
    source, where = f"SELECT DISTINCT {', '.join(ids)} FROM past_events", ""
    joins = []
    if snapshots is not None:
        source += f" UNION SELECT id AS {ids[0]} FROM {keys[0]}_snapshots"
        now = latest_moment(config.drop.later_than, config.time_zone)
        joins.append(
            f"LEFT JOIN {keys[0]}_snapshots t ON k.{ids[0]} = t.id AND t.valid_from <= {now} "
            f"AND t.valid_until > {now}"
        )
        for name, feature in snapshots.columns.items():
            column = f"t.{quoted(f'f_{name}')}"
            column = f"CAST({column} AS FLOAT)" if feature.kind == "dense" else column
            columns.append(filled(column, feature.fill, name))
    if counts:
        same = " AND ".join(f"k.{key} = c.{key}" for key in ids)
        joins.append(f"LEFT JOIN {stage} c ON {same}")
        for name in counts:
            count = f"coalesce(c.{quoted(f'n_{name}')}, 0)"
            columns.append(f"CAST({count} AS FLOAT) AS {quoted(name)}")
            columns.append(f"CAST({time} AS BIGINT) AS {quoted(f'{name}@')}")
        if snapshots is None:
            some = " OR ".join(f"c.{quoted(f'n_{name}')} > 0" for name in counts)
            where = f"WHERE ({some})"
    has_ids = " AND ".join(f"{key} IS NOT NULL" for key in ids)
    source = f"SELECT * FROM ({source}) WHERE {has_ids}"
    return f"SELECT {', '.join(columns)} FROM ({source}) k {' '.join(joins)} {where}"
