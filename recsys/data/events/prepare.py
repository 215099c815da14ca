"""`recsys prepare events`: from logs to datasets, in stages that an engine runs."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from recsys.data.events.engines.base import Engine
from recsys.data.events.engines.on_duckdb import DuckDBEngine
from recsys.data.events.engines.on_spark import SparkEngine
from recsys.data.events.history_values import HistoryFiles
from recsys.data.events.load import load_events_config
from recsys.data.events.negatives import add_negatives
from recsys.data.events.output.dataset import write_dataset
from recsys.data.events.output.pictures import check_pictures
from recsys.data.events.past import add_past
from recsys.data.events.rows import make_rows
from recsys.data.events.settings import EventsConfig
from recsys.data.events.signals import Dropped, read_signals
from recsys.data.events.snapshots import add_features, read_snapshots
from recsys.data.events.splits import Conditions, split_conditions
from recsys.data.filesystem import whole_folder


def prepare_events(
    config: Path,
    out: Path,
    source: Path | None = None,
    memory: str | None = None,
    spark_master: str | None = None,
    threads: int | None = None,
    temp: Path | None = None,
) -> dict[str, Any]:
    """Write the dataset that `config` describes; it appears complete or not at all.

    Args:
        config: an `events.yaml`; see `settings`.
        out: folder to write; must not exist or be empty. With rolling windows it holds the datasets
            `window-1`, `window-2` ...
        source: folder of the relative paths in `config`; None: its own.
        memory: most memory that DuckDB takes, such as 4GB; None: 80 % of the machine's. Python
            takes up to 2 GB more.
        spark_master: address of a Spark cluster, or such as local[2], to run on instead of DuckDB.
        threads: threads of DuckDB, and files written at a time; None: the cores that this process
            may use.
        temp: folder for the stages and what does not fit into memory, a few times the size of the
            logs; None: in `out`.

    Returns:
        The report, which is also in `report.json`: events read, rows left out by reason, and
        figures of each split.

    Raises:
        ValueError: a setting, file, column or value cannot be used, or a split would be empty.

    Example::

        print(format_report(prepare_events(Path("events.yaml"), Path("data/shop"))))
    """
    settings = load_events_config(config, source)
    with whole_folder(unused_folder(out)) as partial:
        return run_stages(settings, partial, memory, spark_master, threads, temp)


def unused_folder(out: Path) -> Path:
    """Return the absolute path of a folder to write.

    Raises:
        ValueError: it exists and is not an empty folder, or is a URL.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(out)):  # a Path has one slash left
        raise ValueError(f"--out {out}: a URL; name a local folder, and copy that to the URL")
    out = out.resolve() if out.is_dir() else out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists already; remove it or name another output folder")
    return out


def run_stages(
    config: EventsConfig,
    folder: Path,
    memory: str | None = None,
    spark_master: str | None = None,
    threads: int | None = None,
    temp: Path | None = None,
) -> dict[str, Any]:
    """Write the datasets and `report.json` into a folder, and return the report.

    Raises:
        ValueError: a file, column or value cannot be used, or a split would be empty.
    """
    if temp is not None and not temp.is_dir():
        raise ValueError(f"--temp {temp}: no such folder; make it, or name another")
    in_temp = None if temp is None else tempfile.mkdtemp(prefix="prepare-events-", dir=temp)
    work = folder / "stages" if in_temp is None else Path(in_temp)
    try:
        engine = (
            DuckDBEngine(work, memory, threads)
            if spark_master is None
            else SparkEngine(work, spark_master)
        )
        with closing(engine):
            report = write_datasets(engine, config, make_samples(engine, config), folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


@dataclass(frozen=True)
class Samples:
    """The stage `complete`: all samples, with all their columns.

    datasets: SQL conditions of each split of each dataset.
    lists: types of the histories and the lists beside them, by name.
    files: values of the histories, if samples have slices of these instead of lists.
    """

    datasets: Conditions
    lists: dict[str, pa.DataType]
    files: HistoryFiles | None
    dropped: Dropped


def make_samples(engine: Engine, config: EventsConfig) -> Samples:
    """Run the stages up to `complete`."""
    types, dropped = read_signals(engine, config)
    reasons = dict(dropped.reasons)
    if config.items is not None:
        reasons |= read_snapshots(engine, "item", config.items, types["iid"])
        check_pictures(engine, config.items)
    if config.users is not None:
        reasons |= read_snapshots(engine, "user", config.users, types["uid"])
    reasons |= make_rows(engine, config)
    datasets, embargoed = split_conditions(engine, config)
    reasons |= embargoed
    source = "rows"
    if config.negatives is not None:
        datasets, given_up = add_negatives(engine, config, datasets)
        reasons |= given_up
        source = "drawn"
    reasons |= add_features(engine, config, source)
    files = None if engine.own_files is None else HistoryFiles(engine.own_files, config.histories)
    lists = add_past(engine, config, types, files)
    return Samples(datasets, lists, files, Dropped(dropped.read, reasons))


def write_datasets(
    engine: Engine, config: EventsConfig, samples: Samples, folder: Path
) -> dict[str, Any]:
    """Write the datasets into a folder and return the report."""
    splits: dict[str, Any] = {}
    items: Path | None = None
    for dataset, conditions in samples.datasets.items():
        figures = write_dataset(
            engine, config, conditions, folder, dataset, samples.lists, samples.files, items
        )
        items = folder / dataset / "items"
        splits |= {str(Path(dataset, split)): of for split, of in figures.items()}
    dropped = samples.dropped
    return {"events": dropped.read, "left_out": dropped.reasons, "splits": splits}


def format_report(report: dict[str, Any]) -> str:
    """Return the report of `prepare_events` as text."""
    lines = [f"{report['events']:,} events and impressions read"]
    lines += [f"left out: {count:,} {reason}" for reason, count in report["left_out"].items()]
    return "\n".join([*lines, format_splits(report["splits"], "positive")])


def format_splits(splits: dict[str, dict[str, Any]], positive: str) -> str:
    """Return the figures of splits as a table; `positive` heads the share of positive rows."""
    width = max(map(len, splits)) + 1
    head = f"{'split':<{width}}{'rows':>12}{positive:>10}{'users':>11}{'new users':>11}"
    lines = [
        f"{name:<{width}}{split['rows']:>12,}{split['positive']:>10.2%}{split['users']:>11,}"
        f"{split['new_users']:>11.1%}{split['cold']:>8.1%}{split['unseen']:>8.1%}"
        for name, split in splits.items()
    ]
    return "\n".join([f"{head}{'cold':>8}{'unseen':>8}", *lines])
