"""`recsys prepare events`: make datasets of logs in stages, which are tables of an SQL engine."""

import json
import re
from pathlib import Path
from typing import Any

from recsys.data.events.clean_events import read_events
from recsys.data.events.daily import prepare_days
from recsys.data.events.dataset import DatasetWriter, complete_samples
from recsys.data.events.load import load_events_config
from recsys.data.events.samples import make_rows, split_conditions
from recsys.data.events.settings import EventsConfig
from recsys.data.events.snapshots import read_snapshots
from recsys.data.events.sql import SqlEngine, open_engine
from recsys.storage.files import atomic_folder


def prepare_events(
    config: Path,
    out: Path,
    source: Path | None = None,
    memory: str | None = None,
    spark_master: str | None = None,
    threads: int | None = None,
    temp: Path | None = None,
    until: str | None = None,
) -> dict[str, Any]:
    """Write the dataset that `config` describes, atomically; return its report.

    The arguments are those of the command; with `spark_master`, such as local[2], Spark runs it.
    The report, also in `report.json`, has events read, rows left out, and figures of each split.
    Unusable settings or data are a ValueError.
    """
    if until is not None:
        report = prepare_days(config, out, until, source, memory, threads, temp, spark_master)
        assert report is not None, "new files or not"
        return report
    settings = load_events_config(config, source)
    with (
        atomic_folder(unused_folder(out)) as partial,
        open_engine(partial, temp, memory, threads, spark_master) as engine,
    ):
        return write_datasets(engine, settings, partial)


def unused_folder(out: Path) -> Path:
    """Return the absolute path of a folder to write; one in use, or a URL, is a ValueError."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(out)):  # Path turns `://` into `:/`
        raise ValueError(f"--out {out}: a URL; name a local folder, and copy that to the URL")
    out = out.resolve() if out.is_dir() else out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists already; remove it or name another output folder")
    return out


def make_samples(engine: SqlEngine, config: EventsConfig) -> tuple[DatasetWriter, dict[str, Any]]:
    """Run the stages up to `complete`; return a writer of datasets, and the report so far."""
    types, num_read, reasons = read_events(engine, config)
    reasons |= read_snapshots(engine, config, types)
    reasons |= make_rows(engine, config)
    datasets, embargoed = split_conditions(engine, config)
    writer, missing = complete_samples(engine, config, types, datasets)
    return writer, {"events": num_read, "left_out": reasons | embargoed | missing}


def write_datasets(engine: SqlEngine, config: EventsConfig, folder: Path) -> dict[str, Any]:
    """Run all stages, write the datasets and `report.json` into a folder; return the report."""
    writer, report = make_samples(engine, config)
    report["splits"] = writer.write(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def format_report(report: dict[str, Any]) -> str:
    """Return the report of `prepare_events` as text."""
    lines = [f"{report['events']:,} events and impressions read"]
    lines += [f"left out: {count:,} {reason}" for reason, count in report["left_out"].items()]
    if "days" not in report:
        return "\n".join([*lines, format_splits(report["splits"], "positive")])
    days = {f"date={day}": stats for day, stats in report["days"].items()}
    width = max(map(len, ["partition", *days])) + 1
    head = f"{'partition':<{width}}{'rows':>12}{'positive':>10}"
    rows = [
        f"{name:<{width}}{stats['rows']:>12,}{stats['positive']:>10.2%}"
        for name, stats in days.items()
    ]
    return "\n".join([*lines, head, *rows])


def format_splits(splits: dict[str, dict[str, Any]], positive: str) -> str:
    """Return the figures of splits as a text table; `positive` titles the share of positives."""
    width = max(map(len, splits)) + 1
    head = f"{'split':<{width}}{'rows':>12}{positive:>10}{'users':>11}{'new users':>11}"
    lines = [
        f"{name:<{width}}{split['rows']:>12,}{split['positive']:>10.2%}{split['users']:>11,}"
        f"{split['new_users']:>11.1%}{split['cold']:>8.1%}{split['unseen']:>8.1%}"
        for name, split in splits.items()
    ]
    return "\n".join([f"{head}{'cold':>8}{'unseen':>8}", *lines])
