"""Memory of a job whose tables fill most of the machine: train, checkpoint, resume.

`python -m benchmarks.memory --rows 50000000 --dim 60 --out FOLDER` trains an ID-only model with one
large row-wise table over two ranks, continues from its checkpoint, and compares the peak of
resident memory over all ranks with 1.25 x (tables + optimizer state) + 2 GB. It prints a JSON
line for each phase and exits with 1 if a peak is higher. FOLDER needs room for three checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

GB = 1e9
ROWS = {"train": 20_000, "valid": 1_000, "test": 1_000}
SCHEMA = """\
target_item: item
group: user
columns:
  user: {{kind: id, num_embeddings: 1000}}
  item: {{kind: id, num_embeddings: {rows}}}
  history: {{kind: sequence, shares: item}}
  liked: {{kind: label}}
"""


def write_data(folder: Path, num_items: int) -> None:
    """Write random impressions of items from the whole range."""
    rng = np.random.default_rng(0)
    for split, rows in ROWS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        history = rng.integers(num_items, size=(rows, 5)).tolist()
        table = pa.table(
            {
                "user": rng.integers(1000, size=rows),
                "item": rng.integers(num_items, size=rows),
                "history": pa.array(history, pa.list_(pa.int64())),
                "liked": rng.integers(2, size=rows).astype(np.float32),
            }
        )
        pq.write_table(table, folder / split / "part-0.parquet")
    (folder / "schema.yaml").write_text(SCHEMA.format(rows=num_items))


def peak_of(words: list[str], ranks: int) -> tuple[float, float]:
    """Run `recsys` on some ranks; return (peak of resident bytes over all ranks, seconds)."""
    command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "--"]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start, peak = time.perf_counter(), 0
    job = subprocess.Popen([*command, "recsys.cli", *words], env=env)
    while job.poll() is None:
        resident = 0
        for process in psutil.Process(job.pid).children(recursive=True):
            try:
                resident += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, resident)
        time.sleep(0.05)
    if job.returncode:
        raise SystemExit(f"the job ended with {job.returncode}")
    return peak, time.perf_counter() - start


def main() -> int:
    """Measure both phases; return 0 if the peaks are within the limit, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000_000, help="rows of the table")
    parser.add_argument("--dim", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    data, run = arguments.out / "data", arguments.out / "run"
    write_data(data, arguments.rows)
    words = ["train", "--config", "recsys/recipes/id_only.yaml", "--data", str(data)]
    words += ["--out", str(run), "--embedding.dim", str(arguments.dim), "--device", "cpu"]
    words += ["--embedding.sharding", "row_wise", "--checkpoint.keep", "1"]
    state = arguments.rows * (arguments.dim + 1) * 4  # weights and one moment per row
    limit = 1.25 * state + 2 * GB
    fits = True
    for phase, epochs in (("train and checkpoint", 1), ("resume and train on", 2)):
        peak, seconds = peak_of([*words, "--epochs", str(epochs)], arguments.ranks)
        line = {
            "phase": phase,
            "tables_and_optimizer_gb": round(state / GB, 2),
            "peak_gb": round(peak / GB, 2),
            "limit_gb": round(limit / GB, 2),
            "seconds": round(seconds),
        }
        print(json.dumps(line), flush=True)
        fits = fits and peak <= limit
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
