"""Time and memory of `recsys prepare events` at scale, beside plain SQL and Polars.

    python -m benchmarks.events --out FOLDER

Users click and buy; each click is a sample with the user's last 50 clicks, and whether the item was
bought within a day. `plain_sql` and `plain_polars` write the same rows of this one log by hand,
which a small log shows first: equal splits in the same order, item counts and maps of ids. Jobs
are processes of their own; the peak is that of all memory that these have. Larger logs than
`--peers_up_to` are prepared by `recsys` alone: the others hold all lists in memory or sort them on
disk. Polars is left out if it is not installed (`pip install polars`). Writes `events.jsonl`, `.md`
and `.png` into `--results`, and exits with 1 if a requirement is not met.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.events.jobs import differences, measured
from benchmarks.events.log import CONFIG, HISTORY, write_log
from benchmarks.results import RESULTS, Result, require_own_folder, write_result
from recsys.data.events.splits import SPLITS

OURS, SQL, POLARS = "recsys prepare events", "plain SQL (DuckDB)", "Polars"
MOST_BYTES, MOST_GROWTH, LEAST_SHARE = 4e9, 12, 0.5
SMALL, QUICK = 100_000, 20_000  # events


def benchmark(
    out: Path,
    rows: Sequence[int] = (10_000_000, 100_000_000),
    users: int = 1_000_000,
    items: int = 100_000,
    memory: str = "1900MB",
    peer_memory: str = "3500MB",
    peers_up_to: int = 10_000_000,
    quick: bool = False,
    results: Path = RESULTS,
) -> bool:
    """Measure all sizes and return whether the requirements are met.

    Args:
        out: folder for logs and datasets, each of which is removed after its measurement.
        rows: numbers of events.
        users: users of the log.
        items: items of the log.
        memory: limit of DuckDB's memory in `recsys`, where Python has some of its own.
        peer_memory: limit of DuckDB's memory in plain SQL.
        peers_up_to: largest number of events that the other programs get.
        quick: try a small size.
        results: folder for the figures.
    """
    require_own_folder(quick, results)
    sizes, small = ((QUICK,), QUICK) if quick else (tuple(rows), SMALL)
    names = [OURS, SQL]
    if importlib.util.find_spec("polars") is not None:
        names.append(POLARS)
    else:
        print("Polars is not installed and left out; pip install polars")
    limits = {OURS: memory, SQL: peer_memory}
    _require_equal(out / "small", names, (small, users, items), limits)
    records, failed = [], []
    for number in sizes:
        measured_runs, failures = _measure(
            out / f"{number}",
            (number, users, items),
            names if number <= peers_up_to else [OURS],
            limits,
        )
        records += measured_runs
        failed += failures
    verdicts = _verdicts(records)
    result = _result(records, verdicts, limits)
    result.reading += failed
    write_result(result, results)
    return all(verdicts.values())


def _measure(
    folder: Path, size: tuple[int, int, int], names: list[str], limits: dict[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a record of each program on a log, and sentences on those that failed.

    Raises:
        RuntimeError: `recsys` itself failed.
    """
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    _write(folder, size)
    for name in names:
        try:
            took = measured(_words(name, folder, limits))
        except RuntimeError as error:
            if name == OURS:
                raise
            failed.append(f"{name} did not finish {size[0]:,} events: {error}.")
        else:
            lists = _list_values(folder / "data")
            records.append({"job": name, "events": size[0], "list_values": lists, **asdict(took)})
            print(records[-1], flush=True)
        shutil.rmtree(folder / "data", ignore_errors=True)
    shutil.rmtree(folder)
    return records, failed


def _write(folder: Path, size: tuple[int, int, int]) -> None:
    write_log(folder / "log", *size)
    (folder / "events.yaml").write_text(CONFIG)


def _words(name: str, folder: Path, limits: dict[str, str]) -> list[str]:
    """Return the words after `python` that make `folder/data`."""
    log, data = str(folder / "log"), str(folder / "data")
    if name == SQL:
        return ["-m", "benchmarks.events.plain_sql", log, data, limits[SQL]]
    if name == POLARS:
        return ["-m", "benchmarks.events.plain_polars", log, data]
    words = ["-m", "recsys.cli", "prepare", "events", "--memory", limits[OURS]]
    return [*words, "--config", str(folder / "events.yaml"), "--out", data]


def _require_equal(
    folder: Path, names: list[str], size: tuple[int, int, int], limits: dict[str, str]
) -> None:
    """Require that all programs write the same dataset of a small log."""
    _write(folder, size)
    for name in names:
        measured(_words(name, folder, limits))
        (folder / "data").rename(folder / name)
        if different := differences(folder / OURS, folder / name):
            raise RuntimeError(f"{name} writes another dataset: {different}")
    shutil.rmtree(folder)


def _list_values(data: Path) -> int:
    """Return the number of values in all histories of a dataset."""
    values = 0
    for split in SPLITS:
        for file in (data / split).iterdir():
            metadata = pq.read_metadata(file)
            column = metadata.schema.names.index("element")
            groups = range(metadata.num_row_groups)
            values += sum(metadata.row_group(group).column(column).num_values for group in groups)
    return values


def _verdicts(records: list[dict[str, Any]]) -> dict[str, bool]:
    """Return each requirement, with what was measured, and whether it is met."""
    ours = {record["events"]: record for record in records if record["job"] == OURS}
    peak = max(record["peak"] for record in ours.values())
    verdicts = {
        f"{peak / 1e9:.2f} GB of memory at most, of {MOST_BYTES / 1e9:g} GB": peak <= MOST_BYTES
    }
    if len(ours) > 1:
        least, most = ours[min(ours)], ours[max(ours)]
        growth = most["seconds"] / least["seconds"]
        verdicts[
            f"{growth:.1f} times the seconds for {max(ours) / min(ours):g} times the events (and "
            f"{most['list_values'] / least['list_values']:.1f} times the values in histories), of "
            f"{MOST_GROWTH} times"
        ] = growth <= MOST_GROWTH
    for number, run in ours.items():
        peer_seconds = [r["seconds"] for r in records if r["events"] == number and r["job"] != OURS]
        if peer_seconds:
            share = min(peer_seconds) / run["seconds"]
            verdicts[
                f"{share:.2f} times the speed of the fastest other program at {number:,} events, "
                f"at least {LEAST_SHARE}"
            ] = share >= LEAST_SHARE
    return verdicts


def _result(
    records: list[dict[str, Any]], verdicts: dict[str, bool], limits: dict[str, str]
) -> Result:
    columns = ["program", "events", "seconds", "events/s", "processor s", "peak, GB"]
    columns.append("values in histories")
    rows = [
        (
            record["job"],
            f"{record['events']:,}",
            f"{record['seconds']:.1f}",
            f"{record['events'] / record['seconds']:,.0f}",
            f"{record['processor']:.1f}",
            f"{record['peak'] / 1e9:.2f}",
            f"{record['list_values']:,}",
        )
        for record in records
    ]
    reading = [
        f"Requirement {'met' if met else 'NOT MET'}: {words}." for words, met in verdicts.items()
    ]
    reading.append(
        f"Users and items follow Zipf's law; a sample has up to {HISTORY} clicks and their ages. "
        "All programs write the same splits in the order of time, item counts and maps of ids: "
        f"equal at {SMALL:,} events. `recsys` checks the log, too, and reports. DuckDB has "
        f"{limits[OURS]} in `recsys`, whose histories are mapped files, and {limits[SQL]} alone; "
        "the peak is that of all memory of a program, mapped files included."
    )

    def draw(figure: Figure) -> None:
        _draw(figure, records)

    lines = [{"benchmark": "events", "configuration": CONFIG, **record} for record in records]
    return Result("events", "Datasets of event logs", lines, columns, rows, draw, reading)


def _draw(figure: Figure, records: list[dict[str, Any]]) -> None:
    axes = figure.add_subplot()
    names = [f"{record['job']}, {record['events'] / 1e6:g} M" for record in records]
    axes.barh(names, [record["events"] / record["seconds"] for record in records])
    axes.set_xlabel("events/s")


if __name__ == "__main__":
    sys.exit(0 if auto_cli(benchmark, as_positional=False) else 1)
