"""Measure the neighbours alone, on generated logs of equal structure with growing numbers of users.

    python -m benchmarks quality neighbour-scaling

Users and items have vectors of `TASTES` numbers; a rating is an item's mean plus their product plus
noise. Statistics count the first events of each user; later events of some users are ranked.
Nothing is trained: GAUC is measured of the evidence map's initial sum, and of the first vote.

Shapes: E events, N rows, I items.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, Result, require_other_folder, write_result
from recsys.config import NeighbourSettings
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column
from recsys.evaluation.metrics import grouped_auc
from recsys.ranking.layers.evidence import NUM_VOTES
from recsys.ranking.neighbours import Neighbours
from recsys.ranking.vectors import InputDimensions
from recsys.training.neighbour_statistics import Events, fill_statistics

USERS = (500, 5_000, 50_000)
NUM_ITEMS, TASTES, EVENTS_OF_USER, FIRST_EVENTS = 2_000, 8, 60, 45
RANKED_USERS, BATCH_SIZE, STEPS, QUICK_STEPS = 400, 512, 20, 2
GAUC_TOLERANCE, COST_TOLERANCE = 0.005, 1.15


@dataclass(frozen=True)
class Log:
    """Events in the order of users and of time, as many for each user: [users, events]."""

    items: np.ndarray
    values: np.ndarray

    @staticmethod
    def generated(num_users: int, num_items: int) -> Log:
        """Return a log in which users see items by popularity alone."""
        generator = np.random.default_rng(0)
        tastes = generator.standard_normal((num_items, TASTES)) / TASTES**0.5
        means = generator.standard_normal(num_items) * 0.5
        popularity = 1 / np.arange(10, num_items + 10)
        # Sampling without replacement, by the largest perturbed logarithms (Gumbel top-k).
        log_popularity = np.log(popularity).astype(np.float32)
        items = np.empty((num_users, EVENTS_OF_USER), np.int64)
        values = np.empty(items.shape)
        for user in range(num_users):
            noise = generator.gumbel(size=num_items).astype(np.float32)
            items[user] = np.argpartition(log_popularity + noise, -EVENTS_OF_USER)[-EVENTS_OF_USER:]
            generator.shuffle(items[user])
            liking = tastes[items[user]] @ generator.standard_normal(TASTES)
            value_noise = generator.standard_normal(EVENTS_OF_USER)
            values[user] = means[items[user]] + liking + value_noise
        return Log(items, values)

    def first_events(self) -> Events:
        users = np.repeat(np.arange(len(self.items)), FIRST_EVENTS)
        items, values = (column[:, :FIRST_EVENTS].ravel() for column in (self.items, self.values))
        return Events(users, items, values, np.zeros_like(users)).distinct()

    def ranked_rows(self, last_users: int) -> pa.Table:
        """Return the later events of the last users as rows; liked are values over the mean."""
        first = max(len(self.items) - last_users, 0)
        rows: dict[str, list[Any]] = {name: [] for name in ("user", "item", "history", "stars")}
        liked = []
        for user in range(first, len(self.items)):
            for index in range(FIRST_EVENTS, EVENTS_OF_USER):
                rows["user"].append(user)
                rows["item"].append(self.items[user, index])
                rows["history"].append(self.items[user, :FIRST_EVENTS])
                rows["stars"].append(self.values[user, :FIRST_EVENTS].astype(np.float32))
                liked.append(float(self.values[user, index] > 0))
        count = {ROW_POSITION: np.arange(len(liked))}
        return pa.table({**rows, "liked": pa.array(liked, pa.float32()), **count})


def benchmark(users: tuple[int, ...] = USERS, quick: bool = False, results: Path = RESULTS) -> None:
    """Measure each number of users.

    Args:
        users: numbers of users.
        quick: a few users and items; the figures mean nothing.
        results: folder for the figures.

    Raises:
        SystemExit: GAUC falls, or a step's cost grows, with users.
    """
    require_other_folder(quick, results)
    sizes, num_items = ((50, 100), 200) if quick else (users, NUM_ITEMS)
    measured = [_measured(num_users, num_items) for num_users in sizes]
    timed = [(neighbours, batch) for _, neighbours, batch in measured]
    steps = _step_milliseconds(timed, QUICK_STEPS if quick else STEPS)
    records = [record | {"step_ms": step} for (record, _, _), step in zip(measured, steps)]
    write_result(_result(records), results)
    if not quick:
        _require_scaling(records)


def _measured(num_users: int, num_items: int) -> tuple[dict[str, Any], Neighbours, Batch]:
    """Return the figures of a log, its neighbours in training, and a batch."""
    log = Log.generated(num_users, num_items)
    dimensions = InputDimensions(
        [], 8, 0, num_parallel=1, num_labels=1, parallel_names=("stars",), num_items=num_items
    )
    settings = NeighbourSettings("stars")
    neighbours, events = Neighbours(settings, dimensions, None), log.first_events()
    start = time.perf_counter()
    fill_statistics(neighbours, events, settings)
    seconds = time.perf_counter() - start
    batches = _batches(log.ranked_rows(RANKED_USERS), num_users, num_items)
    buffers = sum(array.nbytes for name, array in neighbours.named_buffers() if "blend" not in name)
    record = {
        "benchmark": "neighbour_scaling",
        "users": num_users,
        "events": len(events.users),
        **_quality(neighbours.eval(), batches),
        "statistics_s": seconds,
        "bytes_per_item": buffers / num_items,
    }
    return record, neighbours.train(), batches[0]


def _batches(rows: pa.Table, num_users: int, num_items: int) -> list[Batch]:
    columns = {
        "user": Column("id", num_embeddings=num_users),
        "item": Column("id", num_embeddings=num_items),
        "history": Column("sequence", shares="item", parallel=["stars"]),
        "liked": Column("label"),
    }
    build = BatchBuilder(Schema("item", "user", columns), pooled_features=[])
    return [build(rows.slice(start, BATCH_SIZE)) for start in range(0, len(rows), BATCH_SIZE)]


@torch.no_grad()
def _quality(neighbours: Neighbours, batches: list[Batch]) -> dict[str, float]:
    outputs = [neighbours(None, batch) for batch in batches]
    scores = {
        "gauc_regression": torch.cat([output.logits[:, 0] for output in outputs]),
        "gauc_votes": torch.cat([output.batch.dense_features[:, -NUM_VOTES] for output in outputs]),
    }
    users = np.concatenate([batch.rows.groups.numpy() for batch in batches])
    labels = np.concatenate([batch.labels[:, 0].numpy() > 0.5 for batch in batches])
    gaucs = {}
    for name, values in scores.items():
        _, aucs, num_rows = grouped_auc(labels, values.numpy(), users)
        gaucs[name] = float(np.average(aucs, weights=num_rows))
    return gaucs


def _step_milliseconds(models: list[tuple[Neighbours, Batch]], steps: int) -> list[float]:
    """Return the median processor time of a step of each; they take turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(steps):
        for (neighbours, batch), seconds in zip(models, times):
            start = time.process_time()
            neighbours(None, batch).logits.sum().backward()
            seconds.append(time.process_time() - start)
    return [1000 * median(seconds) for seconds in times]


def _result(records: list[dict[str, Any]]) -> Result:
    columns = ["users", "events", "GAUC of the regression", "GAUC of a vote", "step, ms"]
    columns += ["statistics, s", "bytes an item"]
    rows = [
        [
            f"{record['users']:,}",
            f"{record['events']:,}",
            f"{record['gauc_regression']:.4f}",
            f"{record['gauc_votes']:.4f}",
            f"{record['step_ms']:.1f}",
            f"{record['statistics_s']:.1f}",
            f"{record['bytes_per_item']:,.0f}",
        ]
        for record in records
    ]
    reading = [
        f"{NUM_ITEMS:,} items, {EVENTS_OF_USER} events of each user, of which {FIRST_EVENTS} count "
        f"in the statistics; a step is a forward and a backward pass of {BATCH_SIZE} rows. Aims: "
        f"GAUC falls by at most {GAUC_TOLERANCE} from each size to the next, and a step costs at "
        f"most {COST_TOLERANCE} times that of the fewest users."
    ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xscale="log", xlabel="users", ylabel="GAUC")
        for name in ("gauc_regression", "gauc_votes"):
            values = [record[name] for record in records]
            axes.plot([record["users"] for record in records], values, "o-", label=name)
        axes.legend()

    title = "Do neighbours rank worse, or cost more, with more users?"
    return Result("neighbour_scaling", title, records, columns, rows, draw, reading)


def _require_scaling(records: list[dict[str, Any]]) -> None:
    for smaller, larger in pairwise(records):
        for name in ("gauc_regression", "gauc_votes"):
            if larger[name] < smaller[name] - GAUC_TOLERANCE:
                raise SystemExit(f"{name} falls from {smaller[name]:.4f} to {larger[name]:.4f}")
    first, last = records[0]["step_ms"], records[-1]["step_ms"]
    if last > COST_TOLERANCE * first:
        raise SystemExit(f"a step costs {last:.1f} ms in place of {first:.1f}")


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
