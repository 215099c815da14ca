"""Writes datasets of the stage `complete`: splits, items, vocabularies and `schema.yaml`."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.engines.base import Engine
from recsys.data.events.history_values import MOMENT, HistoryFiles, slice_columns
from recsys.data.events.negatives import DRAWN_AS
from recsys.data.events.output.pictures import add_pictures
from recsys.data.events.output.schema_file import schema_text
from recsys.data.events.output.vocabularies import counted_ids, id_lists, write_vocabularies
from recsys.data.events.settings import EventsConfig
from recsys.data.events.signals import quoted
from recsys.data.events.splits import SPLITS
from recsys.data.events.times import MICROS
from recsys.data.filesystem import Location, link_or_copy
from recsys.data.item_frequency import COLD_BELOW
from recsys.data.transforms.prepare import check_transformed, fit_transforms

ITEMS_PER_GROUP = 1024  # small, since a row may hold pictures


def write_dataset(
    engine: Engine,
    config: EventsConfig,
    conditions: dict[str, str],
    root: Path,
    dataset: str,
    lists: dict[str, pa.DataType],
    files: HistoryFiles | None,
    items: Path | None,
) -> dict[str, dict[str, Any]]:
    """Write a dataset; `schema.yaml` and what is fitted for it come last.

    `conditions` is the SQL of each split, `dataset` the name of the folder in `root`, empty for the
    root itself. `lists` has the types of the histories and the lists beside them; `files` their
    values, if the stage `complete` has slices of these instead of lists. `items` is the folder of
    items of another dataset of these events.

    Returns:
        Figures of each split; see `_figures`.

    Raises:
        ValueError: a split has no rows, or a transform does not take the values of its column, or
            makes values that training refuses.
    """
    folder = root / dataset
    _write_splits(engine, config, conditions, folder, lists, files)
    train = f"{conditions['train']}{_of_log(config)}"
    counts = engine.table(
        f"SELECT iid AS {quoted(config.output.item)}, count(*) AS train_rows FROM complete c "
        f"WHERE {train} GROUP BY c.iid ORDER BY c.iid"
    )
    pq.write_table(counts, folder / "item_counts.parquet")
    sizes = write_vocabularies(engine, config, train, folder, id_lists(config, lists))
    if config.items is not None:
        _write_items(engine, config, train, folder, items)
    (folder / "schema.yaml").write_text(schema_text(config, sizes, lists))
    fit_transforms(Location.of(folder))
    check_transformed(Location.of(folder))
    return _figures(engine, config, conditions)


def _write_splits(
    engine: Engine,
    config: EventsConfig,
    conditions: dict[str, str],
    folder: Path,
    lists: dict[str, pa.DataType],
    files: HistoryFiles | None,
) -> None:
    """Write the rows of all splits, in the order of time."""
    columns = output_columns(config)
    read, complete = columns, None
    if files is not None:
        read = {name: sql for name, sql in columns.items() if name not in lists}
        read |= {name: quoted(name) for name in slice_columns(config.histories)}
        read[MOMENT] = "ts"
        complete = partial(files.with_lists, columns=list(columns))
    selected = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in read.items())
    for split in SPLITS:
        rows = engine.write(
            f"SELECT {selected} FROM complete c WHERE {conditions[split]} "
            "ORDER BY c.ts, c.uid, c.iid, c.position",
            folder / split,
            complete=complete,
        )
        if not rows:
            of_window = f" of {folder.name}" if config.split.by == "windows" else ""
            raise ValueError(_no_rows(config, split + of_window))


def _no_rows(config: EventsConfig, split: str) -> str:
    time = f"'{config.output.time}'"
    fixes = {
        "user": f"give users with 7 rows or more at distinct {time}, or split by time",
        "windows": f"give rows at more distinct {time}, or fewer windows",
        "time": f"give rows at more distinct {time}, or choose other quantiles",
        "dates": f"choose dates between the first and the last {time}",
    }
    at = "" if config.split.by == "windows" else f" at {config.split.at}"
    fix = fixes[config.split.by]
    if config.embargo and config.label_window:
        fix += ", shorten `within`, or set embargo: false"
    return f"split: {split} has no rows by {config.split.by}{at}; {fix}"


def _of_log(config: EventsConfig) -> str:
    """Return SQL after a condition that leaves out drawn rows."""
    return f" AND {DRAWN_AS} = 0" if config.negatives is not None else ""


def output_columns(config: EventsConfig) -> dict[str, str]:
    """Return SQL of each column of a split, by its name."""
    output, unit = config.output, MICROS[config.output.time_unit]
    columns = {output.user: "uid", output.item: "iid"}
    for name, history in config.histories.items():
        columns |= {each: quoted(f"h_{each}") for each in (name, *history.parallel)}
    for name, feature in config.features.items():
        own = quoted(f"c_{name}")
        columns[name] = f"CAST({own} AS FLOAT)" if feature.kind == "dense" else own
    columns |= {name: f"CAST({quoted(f'n_{name}')} AS FLOAT)" for name in config.counts}
    columns |= {name: f"CAST({quoted(f'l_{name}')} AS FLOAT)" for name in config.labels}
    if config.negatives is not None:
        columns[output.sampled] = f"CAST(CASE WHEN {DRAWN_AS} = 0 THEN 0 ELSE 1 END AS FLOAT)"
    # % has the sign of its left side, and a time before 1970 is rounded down as well.
    columns[output.time] = f"CAST((ts - (ts % {unit} + {unit}) % {unit}) / {unit} AS BIGINT)"
    return columns


def _write_items(
    engine: Engine, config: EventsConfig, train: str, folder: Path, other: Path | None
) -> None:
    """Write each item's content as of the end of training: what the last training row could know.

    An item that comes later has its first snapshot. Items that `min_count` leaves without a row of
    their own are left out. The files of `other`, a folder of the same items, are hard-linked, or
    copied where the file system has no hard links.
    """
    assert config.items is not None
    name = config.output.item
    has_rare = config.vocabulary.min_count.get(name, 1) > 1
    if other is not None and not has_rare and config.items.valid_from is None:
        shutil.copytree(other, folder / "items", copy_function=link_or_copy)
        return
    end = engine.table(f"SELECT max(ts) AS ts FROM complete WHERE {train}")["ts"][0].as_py()
    content = "".join(f", {quoted(f't_{name}')} AS {quoted(name)}" for name in config.items.content)
    rare = f" AND id IN ({counted_ids(engine, config, train, name)})" if has_rare else ""
    rows = engine.write(
        f"SELECT id AS {quoted(name)}{content} FROM item_snapshots s WHERE (valid_from <= {end} "
        f"AND valid_until > {end} OR valid_from > {end} AND valid_from = first_valid_from){rare} "
        "ORDER BY s.id",
        folder / "items",
        ITEMS_PER_GROUP,
    )
    if not rows:
        least = config.vocabulary.min_count.get(name, 1)
        raise ValueError(
            f"vocabulary: min_count of '{name}' is {least}, and no item of `items` occurs as often "
            "up to the last training row; lower it"
        )
    add_pictures(folder / "items", config.items, name)


def _share(condition: str, rows: str) -> str:
    """Return SQL of the share of some rows that satisfy a condition."""
    return f"avg(CASE WHEN {rows} THEN CASE WHEN {condition} THEN 1.0 ELSE 0.0 END END)"


def _figures(
    engine: Engine, config: EventsConfig, conditions: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Return rows, positive (share by the first label), users, and shares of new and cold ones.

    new_users: rows by users without a training row; cold, unseen: rows whose item has few and no
    training rows. Drawn rows do not count for the last three, neither here nor there.
    """
    train = f"{conditions['train']}{_of_log(config)}"
    logged = f"1 = 1{_of_log(config)}"

    label = quoted(f"l_{next(iter(config.labels))}")
    users = f"SELECT uid, count(*) AS n FROM complete WHERE {train} GROUP BY uid"
    items = f"SELECT iid, count(*) AS n FROM complete WHERE {train} GROUP BY iid"
    cases = " ".join(f"WHEN {condition} THEN '{name}'" for name, condition in conditions.items())
    table = engine.table(
        f"SELECT split, count(*) AS rows, avg({label}) AS positive, "
        "count(DISTINCT s.uid) AS users, "
        f"{_share('u.n IS NULL', logged)} AS new_users, "
        f"{_share(f'coalesce(i.n, 0) < {COLD_BELOW}', logged)} AS cold, "
        f"{_share('i.n IS NULL', logged)} AS unseen "
        f"FROM (SELECT *, CASE {cases} END AS split FROM complete) s "
        f"LEFT JOIN ({users}) u ON s.uid = u.uid LEFT JOIN ({items}) i ON s.iid = i.iid "
        "WHERE split IS NOT NULL GROUP BY split"
    )
    return {
        row.pop("split"): {
            name: value if name in ("rows", "users") else float(value)
            for name, value in row.items()
        }
        for row in sorted(table.to_pylist(), key=lambda row: SPLITS.index(row["split"]))
    }
