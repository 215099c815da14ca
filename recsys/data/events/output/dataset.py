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
from recsys.data.events.output.pictures import add_pictures
from recsys.data.events.output.schema_file import schema_text
from recsys.data.events.output.vocabularies import id_lists, write_vocabularies
from recsys.data.events.settings import EventsConfig
from recsys.data.events.signals import quoted
from recsys.data.events.snapshots import FOREVER
from recsys.data.events.splits import SPLITS
from recsys.data.events.times import MICROS
from recsys.data.filesystem import Location, link_or_copy
from recsys.data.item_parts import COLD_BELOW
from recsys.data.transforms.prepare import fit_transforms

ITEMS_PER_GROUP = 1024  # small, since a row may hold pictures


def write_dataset(
    engine: Engine,
    config: EventsConfig,
    conditions: dict[str, str],
    root: Path,
    dataset: str,
    lists: dict[str, pa.DataType],
    files: HistoryFiles | None,
) -> dict[str, dict[str, Any]]:
    """Write a dataset; `schema.yaml` and what is fitted for it come last.

    `conditions` is the SQL of each split, `dataset` the name of the folder in `root`, empty for the
    root itself. `lists` has the types of the histories and the lists beside them; `files` their
    values, if the stage `complete` has slices of these instead of lists.

    Returns:
        Figures of each split; see `_figures`.

    Raises:
        ValueError: a split has no rows, or a transform does not take the values of its column.
    """
    folder = root / dataset
    _write_splits(engine, config, conditions, folder, lists, files)
    train = conditions["train"]
    counts = engine.table(
        f"SELECT iid AS {quoted(config.output.item)}, count(*) AS train_rows FROM complete c "
        f"WHERE {train} GROUP BY c.iid ORDER BY c.iid"
    )
    pq.write_table(counts, folder / "item_counts.parquet")
    sizes = write_vocabularies(engine, config, train, folder, id_lists(config, lists))
    (folder / "schema.yaml").write_text(schema_text(config, sizes, lists))
    fit_transforms(Location.of(folder))
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
    return f"split: {split} has no rows by {config.split.by}{at}; {fixes[config.split.by]}"


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
    columns[output.time] = f"CAST((ts - ts % {unit}) / {unit} AS BIGINT)"
    return columns


def write_items(engine: Engine, config: EventsConfig, folder: Path, same: Path | None) -> Path:
    """Write the last snapshot of each item into a new folder, and return the folder.

    The files of `same`, a folder of the same items, are hard-linked instead, or copied where the
    file system has no hard links.
    """
    assert config.items is not None
    if same is not None:
        shutil.copytree(same, folder, copy_function=link_or_copy)
        return folder
    content = "".join(f", {quoted(f't_{name}')} AS {quoted(name)}" for name in config.items.content)
    engine.write(
        f"SELECT id AS {quoted(config.output.item)}{content} FROM item_snapshots s "
        f"WHERE valid_until = {FOREVER} ORDER BY s.id",
        folder,
        ITEMS_PER_GROUP,
    )
    add_pictures(folder, config.items, config.output.item)
    return folder


def _figures(
    engine: Engine, config: EventsConfig, conditions: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Return rows, positive (share by the first label), users, and shares of new and cold ones.

    new_users: rows by users without a training row; cold, unseen: rows whose item has few and no
    training rows.
    """
    label = quoted(f"l_{next(iter(config.labels))}")
    users = f"SELECT uid, count(*) AS n FROM complete WHERE {conditions['train']} GROUP BY uid"
    items = f"SELECT iid, count(*) AS n FROM complete WHERE {conditions['train']} GROUP BY iid"
    cases = " ".join(f"WHEN {condition} THEN '{name}'" for name, condition in conditions.items())
    table = engine.table(
        f"SELECT split, count(*) AS rows, avg({label}) AS positive, "
        "count(DISTINCT s.uid) AS users, "
        "avg(CASE WHEN u.n IS NULL THEN 1.0 ELSE 0.0 END) AS new_users, "
        f"avg(CASE WHEN coalesce(i.n, 0) < {COLD_BELOW} THEN 1.0 ELSE 0.0 END) AS cold, "
        "avg(CASE WHEN i.n IS NULL THEN 1.0 ELSE 0.0 END) AS unseen "
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
