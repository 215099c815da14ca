"""Batches of an accumulated group train the dense parameters as one batch of their joint size.

Histories are encoded anew and there is no contrastive loss, as the memory bank and in-batch
negatives do depend on which impressions share a batch.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from recsys.build import Job, build_job
from recsys.config import (
    Config,
    ContentSettings,
    ContrastiveSettings,
    EmbeddingSettings,
    HistorySettings,
    TableSettings,
)
from recsys.data.batch import Batch
from recsys.data.parquet.rows import ParquetRows
from tests.datasets import write_dataset, write_parquet
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import (
    TABLES,
    dense_gradients,
    dense_weights,
    em3_config,
    ranks_of,
    table_shards,
)

SIZE, GROUP = 2, 2  # impressions per rank and batch, batches in a group
GROUPS = [2, 2, 1]  # of five batches the last group has what is left
BATCHES = [SIZE] * sum(GROUPS)
JOINT_BATCHES = [SIZE * group for group in GROUPS]
TOLERANCE = 1e-6
# AdamW divides a gradient by its size: where it is nothing but rounding, so is its direction, also
# if the other way of adding up rounds it to 0.
SMALLEST_GRADIENT = 1e-6

by_world_size = pytest.mark.parametrize("world_size", [1, 2])


def batches_of(job: Job, sizes: list[int]) -> list[Batch]:
    """This rank's share of the training rows in batches of these sizes."""
    rows = ParquetRows.of_split(job.root, "train", job.schema)
    table = next(rows.read(0, rows.num_rows))
    starts = [job.ranks.rank * sum(sizes) + sum(sizes[:index]) for index in range(len(sizes))]
    return [job.batch_builder()(table.slice(*bounds)) for bounds in zip(starts, sizes)]


def train_in_groups(job: Job) -> dict[str, Any]:
    """What each of the batches leaves behind."""
    actual: dict[str, Any] = {"gradients": [], "stepped": [], "reductions": []}
    batches = iter(batches_of(job, BATCHES))
    job.model.train()
    job.pipeline.begin(len(BATCHES))
    for _ in BATCHES:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            job.pipeline.progress(batches)
        names = [event.name for event in profiler.events()]
        actual["reductions"].append(names.count("c10d::allreduce_"))
        actual["gradients"].append(dense_gradients(job.em3))
        actual["stepped"].append(job.pipeline.has_stepped)
    return actual | {"weights": dense_weights(job.em3), "tables": table_shards(job)}


def train_on_joint_batches(job: Job) -> dict[str, Any]:
    """The slow reference: the impressions of a group in one batch, and no pipeline."""
    actual: dict[str, Any] = {"gradients": []}
    job.model.train()
    for batch in batches_of(job, JOINT_BATCHES):
        job.pipeline.update.optimizer.zero_grad()
        loss, _ = job.model(batch)
        loss.backward()
        job.pipeline.update.optimizer.step()
        actual["gradients"].append(dense_gradients(job.em3))
    return actual | {"weights": dense_weights(job.em3), "tables": table_shards(job)}


def frozen_tables(folder: Path, accumulate_steps: int) -> Config:
    config = em3_config(
        folder,
        accumulate_steps=accumulate_steps,
        contrastive=ContrastiveSettings(weight=0.0),
        embedding=EmbeddingSettings(
            16, "row_wise", init_std=0.1, tables={t: TableSettings(frozen=True) for t in TABLES}
        ),
    )
    assert isinstance(config.content, ContentSettings)
    config.content.history = HistorySettings(mode="full")
    return config


def tables_under_sgd(folder: Path, accumulate_steps: int) -> Config:
    tables = EmbeddingSettings(16, "row_wise", "sgd", 0.5, init_std=0.1)
    return em3_config(
        folder,
        accumulate_steps=accumulate_steps,
        content="none",
        contrastive=ContrastiveSettings(weight=0.0),
        embedding=tables,
    )


def write_disjoint_batches(folder: Path, world_size: int) -> Path:
    """Impressions of which no two batches of a group share a row of any table, on any rank."""
    write_dataset(folder, num_users=40, num_items=80)
    count = world_size * sum(BATCHES)
    batch_index = [row // SIZE for row in range(count)]
    # The index of each impression's batch within its group, the same on all ranks.
    slots = [batch % len(BATCHES) % GROUP for batch in batch_index]
    table = pa.table(
        {
            "user": pa.array([20 * p + row % 20 for row, p in enumerate(slots)], pa.int64()),
            "item": pa.array([40 * p + row % 20 for row, p in enumerate(slots)], pa.int64()),
            "history": pa.array([[40 * p + 20, 40 * p + 21 + row] for row, p in enumerate(slots)]),
            "history_liked": pa.array([[1.0, 0.0]] * count, pa.list_(pa.float32())),
            "genres": pa.array([[2 * p, 2 * p + 1] for p in slots], pa.list_(pa.int64())),
            "price": pa.array([row / count for row in range(count)], pa.float32()),
            "liked": pa.array([float(row % 3 == 0) for row in range(count)], pa.float32()),
        }
    )
    for path in (folder / "train").iterdir():
        path.unlink()
    write_parquet(folder / "train" / "part-0.parquet", table)
    return folder


def train_both_ways(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    ranks, actual = ranks_of(rank, world_size), {}
    disjoint = folder / f"apart_{world_size}"
    for name, make_config, data in (
        ("frozen", frozen_tables, folder / "data"),
        ("sgd", tables_under_sgd, disjoint),
    ):
        grouped = build_job(make_config(folder, GROUP), str(data), ranks)
        actual[name] = {
            "grouped": train_in_groups(grouped),
            "joint": train_on_joint_batches(build_job(make_config(folder, 1), str(data), ranks)),
        }
    return actual


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("accumulation")
    write_dataset(folder / "data")
    for world_size in (1, 2):
        write_disjoint_batches(folder / f"apart_{world_size}", world_size)
    return {count: run_on_ranks(train_both_ways, count, folder) for count in (1, 2)}


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=TOLERANCE, msg=lambda text: f"{name}: {text}"
    )


@by_world_size
@pytest.mark.parametrize("tables", ["frozen", "sgd"])
def test_gradients_and_weights_equal_those_of_joint_batches(
    runs: Any, tables: str, world_size: int
) -> None:
    """Also of tables under SGD, where the batches of a group touch rows of their own."""
    for run in runs[world_size]:
        grouped, joint = run[tables]["grouped"], run[tables]["joint"]
        at_ends = [step for step, end in zip(grouped["gradients"], grouped["stepped"]) if end]
        assert len(at_ends) == len(GROUPS)
        for actual, expected in zip(at_ends, joint["gradients"], strict=True):
            assert actual.keys() == expected.keys()
            for name, gradient in expected.items():
                assert_close(actual[name], gradient, name)
        for name, weight in joint["weights"].items():
            sizes = torch.stack([step[name].abs() for step in [*joint["gradients"], *at_ends]])
            defined = ((sizes == 0) | (sizes > SMALLEST_GRADIENT)).all(dim=0)
            assert_close(grouped["weights"][name][defined], weight[defined], name)


@by_world_size
def test_tables_under_sgd_end_as_with_joint_batches(runs: Any, world_size: int) -> None:
    for run in runs[world_size]:
        grouped, joint = (run["sgd"][way]["tables"] for way in ("grouped", "joint"))
        for name in TABLES:
            for (offsets, shard), (expected_offsets, expected) in zip(
                grouped[name], joint[name], strict=True
            ):
                assert offsets == expected_offsets
                assert_close(shard, expected, name)


@pytest.mark.parametrize("tables", ["frozen", "sgd"])
def test_gradients_are_only_reduced_where_a_group_ends_and_not_on_one_rank(
    runs: Any, tables: str
) -> None:
    assert not any(runs[1][0][tables]["grouped"]["reductions"])
    for run in runs[2]:
        stepped, reductions = (run[tables]["grouped"][key] for key in ("stepped", "reductions"))
        assert stepped == [False, True, False, True, True]
        # In its first backward of all DistributedDataParallel learns the graph, and reduces.
        assert [count > 0 for count in reductions[1:]] == stepped[1:]
