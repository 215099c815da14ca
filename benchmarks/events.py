"""Time and memory of `recsys prepare events` on synthetic logs, beside plain SQL.

    python -m benchmarks.events --rows [10000000,100000000] --out FOLDER

Users click and buy, items follow Zipf's law, each click is a sample with the user's last 50 clicks.
The plain version is one DuckDB query with list windows that writes the same splits. Each job is a
process of its own; the peak is that of its resident memory. Prints a JSON line per job, and exits
with 1 if a peak exceeds 4 GB or the time of the last size is over 12 times that of the first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from jsonargparse import auto_cli

ROWS_PER_FILE = 5_000_000
HISTORY = 50
MOST_BYTES, MOST_GROWTH = 4e9, 12
CONFIG = f"""\
events:
  log: {{path: log, action: action}}
rows: click
labels:
  bought: {{action: buy, within: 1d}}
histories:
  clicked: {{actions: click, length: {HISTORY}, parallel: {{clicked_age: age}}}}
"""
PLAIN = f"""
import sys, duckdb
log, out, memory = sys.argv[1:]
db = duckdb.connect(config={{"memory_limit": memory, "temp_directory": out + ".spill"}})
db.execute("SET enable_progress_bar = false")
db.execute(f'''COPY (
    WITH click AS (SELECT DISTINCT "user", item, time FROM '{{log}}/*.parquet'
                   WHERE action = 'click'),
    buy AS (SELECT "user", item, time FROM '{{log}}/*.parquet' WHERE action = 'buy'),
    past AS (SELECT *, list(item) OVER w AS clicked, list(time) OVER w AS clicked_at FROM click
             WINDOW w AS (PARTITION BY "user" ORDER BY time, item
                          ROWS BETWEEN {HISTORY} PRECEDING AND 1 PRECEDING))
    SELECT p.*, b.time IS NOT NULL AND b.time - p.time <= 86400 AS bought
    FROM past p ASOF LEFT JOIN buy b
    ON p."user" = b."user" AND p.item = b.item AND p.time <= b.time ORDER BY p.time
) TO '{{out}}' (FORMAT parquet, COMPRESSION zstd)''')
"""


def write_log(folder: Path, rows: int, users: int, items: int) -> None:
    """Write clicks and purchases of 60 days."""
    folder.mkdir(parents=True)
    for first in range(0, rows, ROWS_PER_FILE):
        random = np.random.default_rng(first)
        number = min(ROWS_PER_FILE, rows - first)
        table = {
            "user": random.integers(0, users, number),
            "item": random.zipf(1.2, number) % items,
            "time": 1_790_000_000 + random.integers(0, 60 * 86_400, number),
            "action": pa.array(["click", "buy"]).take(
                pa.array((random.random(number) < 0.1).astype(np.int8))
            ),
        }
        pq.write_table(pa.table(table), folder / f"part-{first:012}.parquet")


def measured(words: list[str]) -> tuple[float, float]:
    """Run Python and return (seconds, peak of resident bytes)."""
    start, peak = time.perf_counter(), 0
    job = subprocess.Popen([sys.executable, *words])
    process = psutil.Process(job.pid)
    while job.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if job.wait():
        raise RuntimeError(f"{' '.join(words[:4])} ended with {job.returncode}")
    return time.perf_counter() - start, peak


def benchmark(
    out: Path,
    rows: tuple[int, ...] = (10_000_000, 100_000_000),
    users: int = 1_000_000,
    items: int = 100_000,
    memory: str = "2GB",
) -> bool:
    """Measure all sizes and return whether the requirements are met.

    Args:
        out: folder for logs and datasets.
        rows: numbers of events.
        users: users of the log, fewer where it has under ten events each.
        items: items of the log.
        memory: limit of DuckDB's memory.
    """
    seconds, met = [], True
    for number in rows:
        folder = out / f"{number}"
        write_log(folder / "log", number, min(users, number // 10), items)
        (folder / "events.yaml").write_text(CONFIG)
        words = ["-m", "recsys.cli", "prepare", "events", "--memory", memory]
        words += ["--config", str(folder / "events.yaml"), "--out", str(folder / "data")]
        plain = ["-c", PLAIN, str(folder / "log"), str(folder / "plain.parquet"), memory]
        for name, command in (("prepare events", words), ("plain SQL", plain)):
            took, peak = measured(command)
            line = {"job": name, "events": number, "seconds": round(took, 1)}
            line |= {"events_per_second": round(number / took), "peak_gb": round(peak / 1e9, 2)}
            print(json.dumps(line), flush=True)
            if name == "prepare events":
                seconds.append(took)
                met &= peak <= MOST_BYTES
    return met and seconds[-1] <= MOST_GROWTH * seconds[0]


if __name__ == "__main__":
    sys.exit(not auto_cli(benchmark, as_positional=False))
