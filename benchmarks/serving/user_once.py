"""Measures a user computed once for all candidates, beside a batch that repeats the user.

    python -m benchmarks.serving.user_once

The model is that of `movielens_multimodal.yaml` with untrained weights, on random vectors: the
graph of a package, in which the history exists once, beside the same ranking model on a batch of a
row per candidate, each with a copy of the history. Both give equal scores. One thread. Exits with 1
if the graph of `din` or `two_tower` is less than three times as fast.

Shapes: N candidates, L history items, D dimension, W width of the bank's vectors, P parallel lists.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.results import RESULTS, ROOT, Result, write_result
from benchmarks.serving.latency import latencies
from recsys.config import content_settings, load_config
from recsys.config.ranking import keys_of, ranking_settings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.model.build import build_ranking
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.vectors import IDVectors, TowerVectors
from recsys.serving.exported_graph import ExportedGraph, export_graph
from recsys.serving.package import GRAPH
from recsys.serving.ranking_graph import RankingGraph, RankingInputs

RECIPE = ROOT / "recsys" / "recipes" / "movielens_multimodal.yaml"
BACKBONES = ("din", "two_tower", "din_dcn", "dlrm")
LEAST_SPEED_UP = {"din": 3.0, "two_tower": 3.0}
USER_DIM, NUM_PARALLEL, NUM_ITEMS = 8, 3, 10_000
OPINION_GROUPS = 512
ONCE, TILED = "user once", "user repeated"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Models:
    """A ranking model of random weights, its graph, and the widths of their inputs."""

    graph: RankingGraph
    exported: nn.Module
    dim: int
    content_dim: int
    num_modalities: int

    def request(self, num_rows: int, num_items: int) -> RankingInputs:
        """Return random vectors of a user with N candidates and L history items."""
        width = self.content_dim * (1 + self.num_modalities)
        return RankingInputs(
            pooled=[torch.randn(1, USER_DIM).expand(num_rows, -1)],
            dense=torch.zeros(num_rows, 0),
            target=torch.randn(num_rows, self.dim),
            history=torch.randn(num_items, self.dim),
            parallel=torch.rand(num_items, NUM_PARALLEL),
            target_items=torch.arange(num_rows),
            history_items=torch.arange(num_items),
            target_content=torch.randn(num_rows, width),
            history_content=torch.randn(num_items, width),
            target_in_bank=torch.zeros(num_rows, 0),
        )

    def tiled(self, given: RankingInputs) -> Tensor:  # [N, C]
        """Return the logits of a batch in which each row has a copy of the history."""
        num_rows, num_items, dim = len(given.target), len(given.history), self.content_dim
        history_map = self.graph.history_map
        assert history_map is not None
        copies = given.history_content.repeat(num_rows, 1)  # [N * L, W]
        of_target, of_history = (
            part[:, dim:].unflatten(1, (-1, dim)) for part in (given.target_content, copies)
        )
        content = ContentVectors(
            given.target_content[:, :dim], history_map(copies[:, :dim]), of_target, of_history
        )
        ids = IDVectors(list(given.pooled), given.target, given.history.repeat(num_rows, 1))
        scored = self.graph.ranking(ids, content, _batch(given, num_rows, num_items))
        return scored.logits if isinstance(scored, TowerVectors) else scored


def _batch(given: RankingInputs, num_rows: int, num_items: int) -> Batch:
    total, zeros = num_rows * num_items, torch.zeros(num_rows, dtype=torch.int64)
    return Batch(
        dense_features=given.dense,
        sparse_features=None,
        labels=torch.zeros(num_rows, 1),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(["item"], zeros, zeros + 1),
        target_items=given.target_items,
        groups=zeros,
        row_positions=zeros,
        history_lengths=torch.full((num_rows,), num_items),
        history_values=given.parallel.repeat(num_rows, 1),
        history_items=given.history_items.repeat(num_rows),
        history_index=torch.arange(total),
        content_items=zeros,
        target_index=zeros,
        history_content_index=zeros[:0],
        bank_items=zeros[:0],
        longest_history=num_items,
    )


def models_of(name: str, recipe: Path = RECIPE) -> Models:
    """Return a backbone with the settings that it shares with the recipe, in evaluation mode."""
    config = load_config(recipe, ["--device", "cpu"])
    content, wanted = content_settings(config), vars(config.ranking)
    assert content is not None
    keys = set(keys_of(name)) & set(wanted) - {"name"}
    dimensions = InputDimensions(
        [USER_DIM],
        config.embedding.dim,
        *(0, NUM_PARALLEL, 1),
        pooled_names=("user",),
        parallel_names=("history_liked", "history_stars", "history_days"),
        group="user",
        num_items=NUM_ITEMS,
    )
    torch.manual_seed(0)
    settings: dict[str, Any] = {key: wanted[key] for key in keys}
    if "opinion_groups" in settings:  # a run derives it from its users
        settings["opinion_groups"] = OPINION_GROUPS
    ranking = build_ranking(ranking_settings(name, **settings), dimensions, content)
    history_map = nn.Linear(content.dim, content.dim, bias=False)
    graph = RankingGraph(ranking, history_map, content.dim)
    models = Models(graph, graph, config.embedding.dim, content.dim, len(content.modalities))
    with TemporaryDirectory() as folder:
        file = Path(folder) / GRAPH
        export_graph(graph, models.request(2, 2), name, file)
        exported = ExportedGraph.load(file)
    return Models(graph, exported, models.dim, models.content_dim, models.num_modalities)


@torch.inference_mode()
def measure(name: str, history: int, candidates: int, rounds: int) -> dict[str, np.ndarray]:
    """Return the milliseconds of processor time of both ways, which score equally."""
    models = models_of(name)
    given = models.request(candidates, history)
    arguments = given.arguments()
    ways: dict[str, Callable[[], object]] = {
        ONCE: lambda: models.exported(*arguments),
        TILED: lambda: models.tiled(given),
    }
    torch.testing.assert_close(
        models.exported(*arguments), models.tiled(given), rtol=TOLERANCE, atol=TOLERANCE
    )
    return latencies(ways, rounds, time.process_time)


def user_once(
    history: int = 200,
    candidates: int = 500,
    rounds: int = 50,
    results: Path = RESULTS,
) -> bool:
    """Measure the backbones and return whether the bars are met.

    Args:
        history: items of the user's history.
        candidates: items to rank.
        rounds: requests of each way that count.
        results: folder for the figures.
    """
    torch.set_num_threads(1)
    times = {name: measure(name, history, candidates, rounds) for name in BACKBONES}
    medians = {
        name: {way: float(np.median(of)) for way, of in ways.items()}
        for name, ways in times.items()
    }
    speed_up = {name: of[TILED] / of[ONCE] for name, of in medians.items()}
    passes = {name: speed_up[name] >= least for name, least in LEAST_SPEED_UP.items()}
    rows = [
        [
            name,
            *(f"{medians[name][way]:.1f}" for way in (ONCE, TILED)),
            f"{speed_up[name]:.1f}",
            f"{LEAST_SPEED_UP[name]:g}" if name in LEAST_SPEED_UP else "",
            {True: "pass", False: "FAIL", None: ""}[passes.get(name)],
        ]
        for name in BACKBONES
    ]
    columns = ["backbone", f"{ONCE}, ms", f"{TILED}, ms", "x faster", "bar", ""]
    records = [
        {"benchmark": "user_once", "backbone": name, "p50": medians[name], "x": speed_up[name]}
        for name in BACKBONES
    ]
    reading = [
        f"{history} history items, {candidates} candidates, one thread; medians of the time of the "
        "processor."
    ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.bar(list(speed_up), list(speed_up.values()))
        axes.set(ylabel="times as fast as a batch that repeats the user")

    title = "The user computed once for all candidates"
    write_result(Result("user_once", title, records, columns, rows, draw, reading), results)
    return all(passes.values())


if __name__ == "__main__":
    sys.exit(0 if auto_cli(user_once, as_positional=False) else 1)
