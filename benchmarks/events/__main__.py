"""Time and memory of `recsys prepare events` at scale, beside plain SQL and Polars.

    python -m benchmarks.events --out FOLDER

Each click is a sample with the user's last 50 clicks; its label is a purchase within a day.
A small log shows that all programs write equal datasets. Logs of more events than `--peers_up_to`
are prepared by `recsys` alone. Polars is optional (`pip install polars`).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.events.log import CONFIG, HISTORY, write_log
from benchmarks.results import RESULTS, Result, require_other_folder, write_result
from recsys.data.events.samples import SPLITS

OURS, SQL, POLARS = "recsys prepare events", "plain SQL (DuckDB)", "Polars"
AIMS = "at most 4 GB, 12 times the seconds for ten times the events, half the fastest peer's speed"
SMALL, QUICK = 100_000, 20_000  # events
TABLES = (*SPLITS, "item_counts.parquet", "vocabulary/user.parquet", "vocabulary/item.parquet")


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
) -> None:
    """Measure all sizes.

    Args:
        out: folder for logs and datasets, each of which is removed after its measurement.
        rows: numbers of events.
        users: users of the log.
        items: items of the log.
        memory: limit of DuckDB's memory in `recsys`; Python needs further memory.
        peer_memory: limit of DuckDB's memory in plain SQL.
        peers_up_to: largest number of events that the other programs are run on.
        quick: try a small size.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    sizes, small = ((QUICK,), QUICK) if quick else (tuple(rows), SMALL)
    names = [OURS, SQL]
    if importlib.util.find_spec("polars") is not None:
        names.append(POLARS)
    else:
        print("Polars is not installed and left out; pip install polars")
    limits = {OURS: memory, SQL: peer_memory}
    _require_equal(out / "small", names, (small, users, items), limits)
    records = []
    for number in sizes:
        programs = names if number <= peers_up_to else [OURS]
        records += _measure(out / f"{number}", (number, users, items), programs, limits)
    write_result(_result(records, limits), results)


def _measure(
    folder: Path, size: tuple[int, int, int], names: list[str], limits: dict[str, str]
) -> list[dict[str, Any]]:
    """Return a record of each program on a log; one that fails, other than ours, is left out."""
    records: list[dict[str, Any]] = []
    _write(folder, size)
    for name in names:
        try:
            measurement = measured(_arguments(name, folder, limits))
        except RuntimeError as error:
            if name == OURS:
                raise
            print(f"{name} did not finish {size[0]:,} events: {error}")
        else:
            lists = _list_values(folder / "data")
            records.append({"job": name, "events": size[0], "list_values": lists, **measurement})
            print(records[-1], flush=True)
        shutil.rmtree(folder / "data", ignore_errors=True)
    shutil.rmtree(folder)
    return records


def _write(folder: Path, size: tuple[int, int, int]) -> None:
    write_log(folder / "log", *size)
    (folder / "events.yaml").write_text(CONFIG)


def _arguments(name: str, folder: Path, limits: dict[str, str]) -> list[str]:
    log, data = str(folder / "log"), str(folder / "data")
    if name == SQL:
        return ["-m", "benchmarks.events.plain_sql", log, data, limits[SQL]]
    if name == POLARS:
        return ["-m", "benchmarks.events.plain_polars", log, data]
    arguments = ["-m", "recsys.cli", "prepare", "events", "--memory", limits[OURS]]
    return [*arguments, "--config", str(folder / "events.yaml"), "--out", data]


def _require_equal(
    folder: Path, names: list[str], size: tuple[int, int, int], limits: dict[str, str]
) -> None:
    _write(folder, size)
    for name in names:
        measured(_arguments(name, folder, limits))
        (folder / "data").rename(folder / name)
        if different := differences(folder / OURS, folder / name):
            raise RuntimeError(f"{name} writes another dataset: {different}")
    shutil.rmtree(folder)


def _list_values(data: Path) -> int:
    values = 0
    for split in SPLITS:
        for file in (data / split).iterdir():
            metadata = pq.read_metadata(file)
            column = metadata.schema.names.index("element")
            groups = range(metadata.num_row_groups)
            values += sum(metadata.row_group(group).column(column).num_values for group in groups)
    return values


def measured(arguments: list[str]) -> dict[str, float]:
    """Run Python with these arguments; return its seconds, processor seconds and peak of bytes.

    Raises:
        RuntimeError: it ended with an error.
    """
    start = time.perf_counter()
    job = subprocess.Popen([sys.executable, *arguments])
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with {job.returncode}")
    return {
        "seconds": time.perf_counter() - start,
        "processor": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
    }


def differences(first_folder: Path, second_folder: Path) -> list[str]:
    """Return the tables and columns that differ by more than the last bits of float32."""
    different = []
    for name in TABLES:
        tables = [pq.read_table(folder / name) for folder in (first_folder, second_folder)]
        names = [table.column_names for table in tables]
        if names[0] != names[1]:
            return [f"{name}: columns {names[0]} and {names[1]}"]
        different += [
            f"{name}: {column}"
            for column in names[0]
            if not _is_close(*(table[column].combine_chunks() for table in tables))
        ]
    return different


def _is_close(first: pa.Array, second: pa.Array) -> bool:
    if pa.types.is_list(first.type):
        lengths = [lists.value_lengths().to_numpy() for lists in (first, second)]
        return np.array_equal(*lengths) and _is_close(first.flatten(), second.flatten())
    if pa.types.is_floating(first.type):
        return len(first) == len(second) and np.allclose(first, second, rtol=1e-6, atol=1e-7)
    return bool(first.equals(second.cast(first.type)))


def _result(records: list[dict[str, Any]], limits: dict[str, str]) -> Result:
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
        f"The aims of `recsys` were {AIMS}.",
        f"Users and items follow Zipf's law; a sample has up to {HISTORY} clicks and their ages. "
        "All programs write the same splits in the order of time, item counts and maps of ids: "
        f"equal at {SMALL:,} events. `recsys` checks the log, too, and reports. DuckDB has "
        f"{limits[OURS]} in `recsys`, whose histories are mapped files, and {limits[SQL]} alone; "
        "the peak is that of all memory of a program, mapped files included.",
    ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = [f"{record['job']}, {record['events'] / 1e6:g} M" for record in records]
        axes.barh(names, [record["events"] / record["seconds"] for record in records])
        axes.set_xlabel("events/s")

    lines = [{"benchmark": "events", "configuration": CONFIG, **record} for record in records]
    return Result("events", "Datasets of event logs", lines, columns, rows, draw, reading)


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
