"""Requests of several users in one call of the ranking model, beside one call for each.

    python -m benchmarks.serving.users_together

A graph takes the candidates of one user, whose history exists once. One call for several users
needs a row per candidate with a copy of the history, as in training: it saves the fixed cost of
calls and repeats the products of histories. Models of random weights as in
`benchmarks.serving.user_once`; milliseconds of processor time, on one thread.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, Result, write_result
from benchmarks.serving.latency import latencies
from benchmarks.serving.user_once import models_of

BACKBONES = ("din_dcn", "two_tower")
SIZES = ((1, 1), (20, 20), (100, 50), (500, 200))  # candidates and history items of a request


@torch.inference_mode()
def measure(name: str, users: int, rounds: int, sizes: tuple[tuple[int, int], ...]) -> list[Any]:
    """Return a record for each size."""
    models, records = models_of(name), []
    for candidates, history in sizes:
        alone = models.request(candidates, history).arguments()
        together = models.request(users * candidates, history)
        times = latencies(
            {
                "alone": lambda alone=alone: models.exported(*alone),  # type: ignore[misc]
                "together": lambda together=together: models.tiled(together),  # type: ignore[misc]
            },
            rounds,
            time.thread_time,
        )
        medians = {way: float(np.median(of)) for way, of in times.items()}
        records.append(
            {
                "benchmark": "users_together",
                "backbone": name,
                "candidates": candidates,
                "history": history,
                "one_by_one": users * medians["alone"],
                "together": medians["together"],
            }
        )
    return records


def users_together(
    users: int = 4,
    rounds: int = 20,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    results: Path = RESULTS,
) -> None:
    """Measure the backbones and write the page.

    Args:
        users: requests that wait, each of a user.
        rounds: calls of each way that count.
        sizes: candidates and history items of a request.
        results: folder for the figures.
    """
    torch.set_num_threads(1)
    records = [record for name in BACKBONES for record in measure(name, users, rounds, sizes)]
    names = [f"{of['backbone']}, {of['candidates']} x {of['history']}" for of in records]
    gains = [of["one_by_one"] / of["together"] for of in records]
    rows = [
        [name, f"{of['one_by_one']:.1f}", f"{of['together']:.1f}", f"{gain:.2f}"]
        for name, of, gain in zip(names, records, gains, strict=True)
    ]
    columns = ["candidates x history", "one by one, ms", "in one call, ms", "x faster"]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(names, gains)
        axes.axvline(1, color="gray")
        axes.set(xscale="log", xlabel="times as fast in one call")

    title = f"Requests of {users} users in one call"
    reading = ["Medians of processor time on one thread, of exported graphs that are not compiled."]
    write_result(Result("users_together", title, records, columns, rows, draw, reading), results)


if __name__ == "__main__":
    auto_cli(users_together, as_positional=False)
