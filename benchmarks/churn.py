"""Memory of a process that trains day after day while the items of its catalogue change.

    python -m benchmarks.churn --out runs/bench

One process trains on 50 partitions, each warm-started from the one before. A partition ranks as
many items as the others, a tenth of which are new, and the item files grow. The items' table, with
a bounded vocabulary, has rows for a third of all items: in the end most have been evicted. A use
counts half after about a partition, so that items of earlier days give way. What is measured is
resident memory after each partition. It is flat if the mean of the last fifth of the partitions is
at most 5 % above that of the second fifth; the first one loads code and fills caches.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, Result, require_own_folder, write_result
from recsys.checkpoint.warm_start.request import WarmStart
from recsys.config import Config, ContentSettings, EmbeddingSettings, ModalitySettings, to_plain
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.training.train import train

GROWTH = 1.05  # of resident memory, from the second fifth of the partitions to the last
FEATURES = 16
SCHEMA = """\
target_item: item
group: user
columns:
  user:    {{kind: id, num_embeddings: {users}}}
  item:    {{kind: id, num_embeddings: {rows}, vocabulary: {{kind: bounded, half_life: 100}}}}
  history: {{kind: sequence, shares: item}}
  liked:   {{kind: label}}
items:
  id: item
  columns:
    clip: {{kind: feature}}
"""


@dataclass(frozen=True)
class Catalogue:
    """Sizes of the log.

    partitions: days. active: items that a day ranks; a tenth of them are new.
    rows: training rows of a day. users: as many as there are.
    """

    partitions: int = 50
    active: int = 10_000
    rows: int = 40_000
    users: int = 1_000

    @property
    def new(self) -> int:
        """New items of a day."""
        return self.active // 10

    @property
    def all_items(self) -> int:
        """Items of all days."""
        return self.active + self.new * (self.partitions - 1)


QUICK = Catalogue(partitions=5, active=60, rows=200, users=20)
QUICK_BATCH = 16


def raw_ids(numbers: np.ndarray) -> np.ndarray:  # int64 [N] -> int64 [N]
    """Return ids that are no rows: far apart, half of them negative."""
    return numbers * np.int64(0x9E3779B97F4A7C1)


def write_partition(folder: Path, catalogue: Catalogue, day: int) -> None:
    """Replace the splits by those of a day, and append its new items to the item files."""
    random = np.random.default_rng(day)
    first = day * catalogue.new
    last = first + catalogue.active
    for split, share in (("train", 1.0), ("valid", 0.05), ("test", 0.05)):
        rows = int(catalogue.rows * share)
        history = raw_ids(random.integers(first, last, size=(rows, 5)))
        columns = {
            "user": random.integers(catalogue.users, size=rows),
            "item": raw_ids(random.integers(first, last, size=rows)),
            "history": pa.array(list(history), pa.list_(pa.int64())),
            "liked": random.integers(2, size=rows).astype(np.float32),
        }
        (folder / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / split / "part-0.parquet")
    known = 0 if day == 0 else last - catalogue.new
    clips = np.random.default_rng((1, day)).random((last - known, FEATURES), np.float32)
    items = {"item": raw_ids(np.arange(known, last)), "clip": pa.array(list(clips))}
    (folder / "items").mkdir(exist_ok=True)
    pq.write_table(pa.table(items), folder / "items" / f"part-{day:03d}.parquet")
    text = SCHEMA.format(users=catalogue.users, rows=catalogue.all_items // 3)
    (folder / "schema.yaml").write_text(text)


def configuration(folder: Path, batch_size: int) -> Config:
    """Return the settings of every partition."""
    return Config(
        content=ContentSettings({"clip": ModalitySettings("feature", "clip")}, dim=32),
        embedding=EmbeddingSettings(dim=32),
        batch_size=batch_size,
        epochs=1,
        device="cpu",
        cache=str(folder / "cache"),
        tracker=[],
    )


def train_partition(
    folder: Path, catalogue: Catalogue, day: int, ranks: Ranks, batch_size: int
) -> dict[str, Any]:
    """Train on a day, from the run of the day before, and measure memory. A collective."""
    data, run, before = folder / "data", folder / f"run-{day}", folder / f"run-{day - 1}"
    if ranks.is_first:
        write_partition(data, catalogue, day)
        shutil.rmtree(folder / f"run-{day - 2}", ignore_errors=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)
    ranks.gather(None)
    warm_start = WarmStart(before, "last") if day else None
    config = configuration(folder, batch_size)
    metrics = train(config, str(data), run, ranks, overwrite=True, warm_start=warm_start)
    gc.collect()
    process = psutil.Process()
    return {
        "partition": day,
        "resident_mb": round(max(ranks.gather(process.memory_info().rss)) / 2**20, 1),
        "open_files": process.num_fds(),
        "items": catalogue.active + catalogue.new * day,
        "seconds": round(metrics["train"]["seconds"], 2),
        **metrics["train"]["vocabularies"]["item"],
    }


def growth_of(resident: list[float]) -> float:
    """Return the memory of the last fifth of the partitions as a multiple of the second fifth's."""
    fifth = max(1, len(resident) // 5)
    return float(np.mean(resident[-fifth:]) / np.mean(resident[fifth : 2 * fifth]))


def churn(out: Path, quick: bool = False, batch_size: int = 512, results: Path = RESULTS) -> bool:
    """Train on all partitions and return whether resident memory stayed flat.

    Under torchrun the ranks train together, and the rank with the most memory counts.

    Args:
        out: folder of the data and the runs, which are removed as the partitions go by.
        quick: few partitions and items, to try the command.
        batch_size: impressions per rank and step.
        results: folder of the page.
    """
    require_own_folder(quick, results)
    catalogue, folder, records = QUICK if quick else Catalogue(), out / "churn", []
    batch_size = QUICK_BATCH if quick else batch_size
    with joined_ranks("cpu") as ranks:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        ranks.gather(None)
        for day in range(catalogue.partitions):
            records.append(train_partition(folder, catalogue, day, ranks, batch_size))
            if ranks.is_first:
                print(json.dumps(records[-1]), flush=True)
        world_size = ranks.world_size
    plain = to_plain(configuration(folder, batch_size))
    about = {"benchmark": "churn", "ranks": world_size, "configuration": plain}
    growth = growth_of([record["resident_mb"] for record in records])
    write_result(_result([about | record for record in records], catalogue, growth), results)
    return growth <= GROWTH


def _result(records: list[dict[str, Any]], catalogue: Catalogue, growth: float) -> Result:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        days = [record["partition"] for record in records]
        axes.plot(days, [record["resident_mb"] for record in records], label="resident MB")
        axes.plot(days, [record["evicted"] for record in records], label="evicted items")
        axes.set_xlabel("partition")
        axes.set_ylim(bottom=0)
        axes.legend()

    step = max(1, len(records) // 10)
    names = ("partition", "items", "admitted", "evicted", "resident_mb", "open_files")
    shown = [*records[:-1:step], records[-1]]
    evicted = sum(record["evicted"] for record in records)
    reading = (
        f"The table has {catalogue.all_items // 3:,} rows for {catalogue.all_items:,} items; "
        f"{evicted:,} times an item lost its row to another. Resident memory of the last fifth of "
        f"the partitions is {growth:.3f} times that of the second fifth (bar: {GROWTH:g})."
    )
    return Result(
        "churn",
        "Memory while items come and go",
        records,
        [name.replace("_", " ") for name in names],
        [[f"{record[name]:,}" for name in names] for record in shown],
        draw,
        [reading],
    )


if __name__ == "__main__":
    sys.exit(0 if auto_cli(churn, as_positional=False) else 1)
