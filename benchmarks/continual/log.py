"""The MovieLens log in partitions of equal size, in the order of time, and views of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.config import ContinualSettings
from recsys.data.movielens.prepare import prepare_movielens
from recsys.training.continual.partition_run import passes_over

HISTORY = 50


def write_log(folder: Path, partitions: int, source: Path | None, rows: int | None) -> list[str]:
    """Write `folder/data` unless it is there; return the names of its partitions, in order.

    Args:
        folder: gets the dataset.
        partitions: their number.
        source: MovieLens as `recsys prepare movielens` reads it; None: the bundled sample.
        rows: number of first ratings; None: all.
    """
    names = [f"part={number + 1:02}" for number in range(partitions)]
    data, prepared = folder / "data", folder / "movielens"
    if data.exists():
        return names
    if not prepared.exists():
        prepare_movielens(source, prepared, HISTORY)
    tables = [pq.read_table(prepared / split) for split in ("train", "valid", "test")]
    log = pa.concat_tables(tables)
    order = np.argsort(log["timestamp"].to_numpy(), kind="stable")
    log = log.take(order)[:rows]
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name, places in zip(names, np.array_split(np.arange(log.num_rows), partitions)):
        (partial / "train" / name).mkdir(parents=True)
        part = log.slice(int(places[0]), len(places))
        pq.write_table(part, partial / "train" / name / "part-0.parquet", row_group_size=2048)
    shutil.copytree(prepared / "items", partial / "items")
    shutil.copy(prepared / "schema.yaml", partial)
    partial.rename(data)
    return names


def view_before(folder: Path, names: list[str], number: int) -> Path:
    """Return a dataset of the partitions before one, which is its validation and test split."""
    data, view = folder / "data", folder / "views" / names[number]
    if view.exists():
        return view
    partial = view.with_name(f".{view.name}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "train").mkdir(parents=True)
    for name in names[:number]:
        (partial / "train" / name).symlink_to(data.absolute() / "train" / name)
    for split in ("valid", "test"):
        (partial / split).symlink_to(data.absolute() / "train" / names[number])
    (partial / "items").symlink_to(data.absolute() / "items")
    shutil.copy(data / "schema.yaml", partial)
    partial.rename(view)
    return view


def rows_trained(folder: Path, names: list[str], number: int, first_passes: list[int]) -> int:
    """Return the rows that a walk trains on in the first partitions, once for each pass."""
    settings = ContinualSettings(first_passes=first_passes)
    return sum(
        passes_over(settings, place, from_nothing=True)
        * pq.read_table(folder / "data" / "train" / name).num_rows
        for place, name in enumerate(names[:number])
    )


def days_of(folder: Path, name: str) -> float:
    """Return the number of days that a partition spans."""
    times = pq.read_table(folder / "data" / "train" / name, columns=["timestamp"])["timestamp"]
    bounds = pc.min_max(times.cast(pa.int64())).as_py()
    return float(bounds["max"] - bounds["min"]) / 86_400
