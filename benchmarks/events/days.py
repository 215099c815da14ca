"""Cost of a day by `recsys prepare events --until`, beside all days at once.

    python -m benchmarks.events.days --out FOLDER --retail FOLDER

Two logs: a synthetic one, and the last days of a shop's. Each day's file comes before its call. The
aim: a day of the second half takes at most 1.3 times its share of the processor seconds that one
call takes for all days. A call without new files measures start-up time, which a second column
subtracts from both.
"""

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jsonargparse import auto_cli

from benchmarks.events.__main__ import measured
from benchmarks.events.log import CONFIG, START, write_log
from benchmarks.results import RESULTS, Result, require_other_folder, write_result

AIM = 1.3
DAY = 86_400
SYNTHETIC = CONFIG.replace("unripe: keep  # the programs beside it cut by quantiles alone\n", "")
RETAIL = """\
events:
  buy: {path: log}
labels:
  bought: {action: buy}
negatives: {per_positive: 4, by: popularity}
histories:
  bought_before: {length: 50, parallel: {bought_age: age}}
counts:
  buys_of_item: {of: item}
  buys_of_month: {of: item, within: 30d}
"""


def benchmark(
    out: Path,
    retail: Path | None = None,
    rows: int = 12_000_000,
    days: int = 12,
    retail_days: int = 60,
    memory: str = "1900MB",
    quick: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measure both logs.

    Args:
        out: folder for logs and datasets, each of which is removed after its measurement.
        retail: folder of `events.parquet`, a shop's log; None: the synthetic log alone.
        rows: events of the synthetic log.
        days: days of the synthetic log.
        retail_days: days at the end of the shop's log.
        memory: limit of DuckDB's memory.
        quick: try a small size.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    rows, days, retail_days = (20_000, 4, 4) if quick else (rows, days, retail_days)
    # In a process that ends, as the peak of one that is started later counts memory held here.
    with get_context("spawn").Pool(1) as pool:
        pool.apply(_write_synthetic, (out / "synthetic", rows, days))
        if retail is not None:
            pool.apply(_write_retail, (out / "retail", retail, retail_days))
    records = [_measure(out / "synthetic", memory)]
    if retail is not None:
        records.append(_measure(out / "retail", memory))
    write_result(_result(records), results)


def _write_synthetic(folder: Path, rows: int, days: int) -> None:
    write_log(folder / "all", rows, max(rows // 10, 10), 100_000, days)
    log = pq.read_table(folder / "all")
    time = pc.subtract(log["time"], START % DAY)  # whole days: a part has another day's rows
    _write_days(folder, log.set_column(log.column_names.index("time"), "time", time), SYNTHETIC)
    shutil.rmtree(folder / "all")


def _write_retail(folder: Path, source: Path, days: int) -> None:
    log = pq.read_table(source / "events.parquet", columns=["user", "item", "time"])
    start = pc.max(log["time"]).as_py() // DAY - days + 1
    _write_days(folder, log.filter(pc.greater_equal(log["time"], start * DAY)), RETAIL)


def _write_days(folder: Path, log: pa.Table, config: str) -> None:
    (folder / "days").mkdir(parents=True)
    (folder / "log").mkdir()
    (folder / "events.yaml").write_text(config)
    number = log["time"].to_numpy() // DAY
    for day in np.unique(number).tolist():
        name = f"{datetime.fromtimestamp(day * DAY, UTC).date()}.parquet"
        pq.write_table(log.filter(pa.array(number == day)), folder / "days" / name)


def _measure(folder: Path, memory: str) -> dict[str, Any]:
    """Return the figures of the calls day by day, and of one call for all days."""
    events, calls = [], []
    for file in sorted((folder / "days").iterdir()):
        file = file.rename(folder / "log" / file.name)
        events.append(pq.read_metadata(file).num_rows)
        calls.append(_call(folder, "daily", file.stem, memory))
    idle, full = (_call(folder, out, file.stem, memory) for out in ("daily", "once"))
    # In a process that ends, as is the log written.
    with get_context("spawn").Pool(1) as pool:
        is_equal = pool.apply(_is_equal, (folder,))
    state = sum(f.stat().st_size for f in (folder / "daily" / ".state").rglob("*") if f.is_file())
    shutil.rmtree(folder)
    record: dict[str, Any] = {
        "log": folder.name,
        "events": events,
        "calls": calls,
        "idle": idle,
        "once": full,
    }
    record |= {"equal": is_equal, "state": state}
    print(record, flush=True)
    return record


def _is_equal(folder: Path) -> bool:
    return all(
        pq.read_table(file).equals(pq.read_table(folder / "daily" / "train" / file.name))
        for file in (folder / "once" / "train").iterdir()
    )


def _call(folder: Path, out: str, day: str, memory: str) -> dict[str, float]:
    command = ["-m", "recsys.cli", "prepare", "events", "--memory", memory, "--until", day]
    paths = ["--config", str(folder / "events.yaml"), "--out", str(folder / out)]
    return measured([*command, *paths])


def _result(records: Sequence[dict[str, Any]]) -> Result:
    columns = ["log", "days", "events", "all days at once, s", "nothing to do, s", "a day, s"]
    columns += [
        "of its share",
        "without starts",
        "peak at once, GB",
        "peak of days, GB",
        "state, MB",
    ]
    return Result(
        "events_days",
        "Days prepared one by one",
        [{"benchmark": "events_days", **record} for record in records],
        columns,
        [_row(record) for record in records],
        None,
        [
            f"The aim is {AIM} times its share. A day is one of the second half, in the mean; its "
            "share is that of its events. Seconds are those of processors.",
            "All rows are equal to those of one call: "
            + ", ".join(f"{record['log']} {record['equal']}" for record in records)
            + ".",
        ],
    )


def _row(record: dict[str, Any]) -> list[str]:
    full, idle, events = record["once"]["processor"], record["idle"]["processor"], record["events"]
    half = len(events) // 2
    day = mean(call["processor"] for call in record["calls"][half:])
    share = mean(events[half:]) / sum(events)
    peak = max(call["peak"] for call in record["calls"])
    return [
        record["log"],
        f"{len(events)}",
        f"{sum(events):,}",
        f"{full:.1f}",
        f"{idle:.2f}",
        f"{day:.2f}",
        f"{day / (share * full):.2f}",
        f"{(day - idle) / (share * (full - idle)):.2f}",
        f"{record['once']['peak'] / 1e9:.2f}",
        f"{peak / 1e9:.2f}",
        f"{record['state'] / 1e6:.1f}",
    ]


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
