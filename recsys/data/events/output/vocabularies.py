"""Writes the maps of raw ids to rows, of ids that occur often enough up to the end of training."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.data.events.engines.base import Engine
from recsys.data.events.settings import EventsConfig
from recsys.data.events.signals import quoted
from recsys.data.filesystem import Location
from recsys.data.schema import vocabulary_file

LARGE_TABLE, ROWS_PER_ID = 1 << 24, 1000  # rows of a table may be unused up to these


def id_lists(config: EventsConfig, lists: dict[str, pa.DataType]) -> dict[str, str]:
    """Return those of the lists beside histories that are of ids, each with its column."""
    return {
        parallel: of.column
        for history in config.histories.values()
        for parallel, of in history.parallel.items()
        if not pa.types.is_floating(lists[parallel].value_type)
    }


def write_vocabularies(
    engine: Engine, config: EventsConfig, train: str, folder: Path, lists: dict[str, str]
) -> dict[str, int]:
    """Write the map of each id table unless ids are rows; return the rows that each table needs.

    Lists of ids beside histories (see `id_lists`) have tables of their own, with the map of their
    column.
    """
    sizes: dict[str, int] = {}
    item = config.output.item
    actions = [name for name, column in lists.items() if column == "action"]
    if config.vocabulary.kind == "rows":
        for name, values in _values(engine, config, "1 = 1", actions).items():
            if name in lists.values():
                values += f" UNION ALL SELECT {quoted(f'e_{name}')} AS id FROM past_events"
            sizes |= dict.fromkeys(_tables_of(name, lists), _num_rows(engine, name, values))
        return sizes
    (folder / "vocabulary").mkdir()
    for name, values in _values(engine, config, train, actions).items():
        least = config.vocabulary.min_count.get(name, 1)
        query = _frequent(values, least)
        if name == item and config.items is not None and least == 1:
            query = f"{query} UNION SELECT id FROM item_snapshots"
        ids = engine.table(f"SELECT id FROM ({query}) ORDER BY id")["id"]
        vocabulary = ExactVocabulary(max(2, len(ids) + 1))
        vocabulary.extend([ids])
        for table in _tables_of(name, lists):
            vocabulary.save(vocabulary_file(Location.of(folder), table).path)
            sizes[table] = vocabulary.num_embeddings
    return sizes


def counted_ids(engine: Engine, config: EventsConfig, train: str, column: str) -> str:
    """Return SQL of the ids of a column that occur as often as `min_count` asks."""
    values = _values(engine, config, train, [])[column]
    return _frequent(values, config.vocabulary.min_count.get(column, 1))


def _frequent(values: str, least: int) -> str:
    return f"SELECT id FROM ({values}) WHERE id IS NOT NULL GROUP BY id HAVING count(*) >= {least}"


def _num_rows(engine: Engine, name: str, values: str) -> int:
    """Return the rows that the table of a column needs, whose values are rows.

    Raises:
        ValueError: they are none, or hardly any row would be used.
    """
    figures = (
        "min(id) AS least, max(id) AS largest, count(*) - count(id) AS nulls, "
        "count(DISTINCT id) AS distinct_ids"
    )
    table = engine.table(f"SELECT {figures} FROM ({values})")
    least, largest, nulls, ids = (column[0].as_py() for column in table.columns)
    problem = None
    if isinstance(largest, str) or (least is not None and least < 0):
        problem = f"has the id {least!r}; write rows from 0"
    elif nulls:
        problem = f"has null in lists or beside events, {nulls} times, which is no row; fill it"
    elif ids and largest >= max(LARGE_TABLE, ROWS_PER_ID * ids):
        problem = (
            f"has {ids:,} ids, of which the largest is {largest}: its table has at most "
            f"{ROWS_PER_ID:,} rows for each id, or {LARGE_TABLE:,}; number the ids"
        )
    if problem is not None:
        raise ValueError(f"vocabulary: kind is rows, but '{name}' {problem}, or choose kind exact")
    return 1 if largest is None else largest + 1


def _tables_of(column: str, lists: dict[str, str]) -> list[str]:
    """Return the tables with the ids of a column: its own, and those of lists of it."""
    return [column, *(name for name, of in lists.items() if of == column)]


def _values(engine: Engine, config: EventsConfig, train: str, actions: list[str]) -> dict[str, str]:
    """Return SQL of the values (id) that count for each column, and for each list of actions."""
    until = f"{config.arrival} <= (SELECT max(ts) FROM complete WHERE {train})"
    tables = {
        config.output.user: f"SELECT uid AS id FROM signals WHERE {until}",
        config.output.item: f"SELECT iid AS id FROM signals WHERE {until}",
    }
    if config.vocabulary.kind == "rows":
        if config.items is not None:
            tables[config.output.item] += " UNION ALL SELECT id FROM item_snapshots"
        tables[config.output.item] += " UNION ALL SELECT iid AS id FROM complete"
    for name, feature in config.features.items():
        column = quoted(f"c_{name}")
        if feature.kind == "id":
            tables[name] = f"SELECT {column} AS id FROM complete WHERE {train}"
        elif feature.kind == "ids":
            tables[name] = f"SELECT {engine.unnest}({column}) AS id FROM complete WHERE {train}"
    for name in actions:
        tables[name] = f"SELECT action AS id FROM signals WHERE {until}"
    return tables
