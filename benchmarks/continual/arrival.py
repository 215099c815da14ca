"""Time from a partition's arrival to its checkpoint, beside a plain epoch over its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from benchmarks.continual.ways import walk
from benchmarks.dataset import DatasetSize, write_dataset

RECIPE = Path(__file__).parents[1] / "settings" / "a.yaml"
MODALITIES = "{text: {kind: feature, column: text}}"


@dataclass(frozen=True)
class Arrival:
    """Seconds of a partition.

    phases: medians over the partitions, by phase. plain: of the same rows inside a plain epoch.
    """

    rows: int
    phases: dict[str, float]
    plain: float

    @property
    def total(self) -> float:
        """Seconds from arrival to checkpoint."""
        return self.phases["total"]


def measure_arrival(out: Path, rows: int, partitions: int = 4) -> Arrival:
    """Walk partitions of so many rows, and train one plain epoch over all of them.

    The first two partitions warm the process up, and the first is not scored.
    """
    folder = out / f"arrival-{rows}"
    _write(folder, rows, partitions)
    words = ("--content.modalities", MODALITIES, "--device", "cpu")
    run = walk(RECIPE, folder, "walk", *words)
    lines = [json.loads(line) for line in (run / "seconds.jsonl").read_text().splitlines()]
    chosen = lines[2:] or lines[-1:]
    names = [name for name in chosen[-1] if name not in ("partition", "rows")]
    phases = {name: median(line[name] for line in chosen) for name in names}
    plain = _plain_epoch(folder, words)
    return Arrival(rows, phases, plain["seconds"] / partitions)


def _write(folder: Path, rows: int, partitions: int) -> None:
    """Write a dataset whose training rows lie in partitions."""
    data = folder / "data"
    if (data / "train" / f"part={partitions - 1}").exists():
        return
    write_dataset(data, DatasetSize(rows * partitions, 20_000, 50_000, image_dim=0))
    table = pq.read_table(data / "train")
    for file in (data / "train").glob("*.parquet"):
        file.unlink()
    for number in range(partitions):
        place = data / "train" / f"part={number}"
        place.mkdir(parents=True)
        part = table.slice(rows * number, rows)
        pq.write_table(part, place / "part-0.parquet", row_group_size=32_768)


def _plain_epoch(folder: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """Train one epoch over all partitions; return what `metrics.json` says of the training."""
    run, log = folder / "runs" / "plain", folder / "runs" / "plain.log"
    command = [sys.executable, "-m", "recsys.cli", "train", "--config", str(RECIPE)]
    command += ["--data", str(folder / "data"), "--out", str(run), "--epochs", "1", *words]
    with log.open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment)
    if done.returncode:
        raise RuntimeError(f"the plain epoch failed; see {log}")
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())["train"]
    return found
