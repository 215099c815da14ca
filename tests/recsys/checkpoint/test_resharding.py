"""What W ranks saved under one plan, W' ranks load under another: same model, same next steps."""

from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor

from recsys.build import Job, build_job
from recsys.checkpoint.manager import Checkpoints
from recsys.checkpoint.progress import Progress
from recsys.data.parquet.rows import ParquetRows
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import em3_config, ranks_of

# Under column-wise plans rowwise_adagrad keeps a moment of each row per column shard, so that there
# updates depend on the plan by nature; see test_table_state.py for what becomes of them.
CASES = [
    ("row_wise", "adagrad"),
    ("table_wise", "adagrad"),
    ("column_wise", "adagrad"),
    ("row_wise", "rowwise_adagrad"),
    ("table_wise", "rowwise_adagrad"),
]
WORLD_SIZES = (1, 2, 3)
GLOBAL_BATCH, STEPS = 12, 3

pytestmark = pytest.mark.long

Case = tuple[int, str, str]  # ranks, plan, table optimizer
# Logits of all ranks on one batch when saved, and the losses of the next steps.
Outcome = tuple[Tensor, list[float]]


def job_of(rank: int, world_size: int, folder: Path, plan: str, optimizer: str) -> Job:
    config = em3_config(folder, plan, optimizer)
    return build_job(config, str(folder / "data"), ranks_of(rank, world_size))


def logits_of_one_batch(job: Job) -> Tensor:
    """Every rank takes the same rows, so that no shape depends on their number.

    No row has a bag of three ids or more: a sum of floats depends on the order, and row-wise ranks
    add up what each of them holds.
    """
    table = next(ParquetRows.of_split(job.root, "valid", job.schema).read(0, 40))
    table = table.filter(pc.less(pc.list_value_length(table["genres"]), 3)).combine_chunks()
    assert table.num_rows > GLOBAL_BATCH
    job.model.eval()
    with torch.no_grad():
        _, (_, logits, _) = job.model(job.batch_builder()(table))
    job.model.train()
    return logits.clone()


def losses_of_steps(job: Job, first: int) -> list[float]:
    """`STEPS` steps on global batches cut over the ranks; mean losses over all ranks."""
    rows = next(
        ParquetRows.of_split(job.root, "train", job.schema).read(0, 2 * STEPS * GLOBAL_BATCH)
    )
    size = GLOBAL_BATCH // job.ranks.world_size
    losses = []
    for step in range(first, first + STEPS):
        start = step * GLOBAL_BATCH + job.ranks.rank * size
        job.pipeline.update.optimizer.zero_grad()
        loss, _ = job.model(job.batch_builder()(rows.slice(start, size)))
        loss.backward()
        job.pipeline.update.optimizer.step()
        losses.append(sum(job.ranks.gather(loss.item())) / job.ranks.world_size)
    return losses


def save_all(rank: int, world_size: int, folder: Path) -> dict[Case, Outcome]:
    """Trains, saves and trains on under every plan."""
    outcomes: dict[Case, Outcome] = {}
    for plan, optimizer in CASES:
        job = job_of(rank, world_size, folder, plan, optimizer)
        losses_of_steps(job, 0)
        checkpoints = Checkpoints(job, folder / f"{world_size}-{plan}-{optimizer}", "data")
        checkpoints.save(Progress(steps=STEPS), wait=True)
        checkpoints.close()
        logits = logits_of_one_batch(job)
        outcomes[world_size, plan, optimizer] = logits, losses_of_steps(job, STEPS)
    return outcomes


def load_all(rank: int, world_size: int, folder: Path) -> dict[tuple[Case, str], Outcome]:
    """Loads every checkpoint under every plan, each into the job of the one before."""
    outcomes: dict[tuple[Case, str], Outcome] = {}
    for plan, optimizer in CASES:
        job = job_of(rank, world_size, folder, plan, optimizer)
        plans = [
            saved_plan for saved_plan, table_optimizer in CASES if table_optimizer == optimizer
        ]
        for saved_world, saved_plan in product(WORLD_SIZES, plans):
            run = folder / f"{saved_world}-{saved_plan}-{optimizer}"
            checkpoints = Checkpoints(job, run, "data")
            assert checkpoints.restore() is not None
            checkpoints.close()
            logits = logits_of_one_batch(job)
            case = (saved_world, saved_plan, optimizer)
            outcomes[case, plan] = logits, losses_of_steps(job, STEPS)
    return outcomes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Case, Outcome]]:
    folder = tmp_path_factory.mktemp("resharding")
    write_dataset(folder / "data", {"train": 2 * STEPS * GLOBAL_BATCH, "valid": 40, "test": 20})
    outcomes: dict[Case, Outcome] = {}
    for world_size in WORLD_SIZES:
        outcomes |= run_on_ranks(save_all, world_size, folder)[0]
    return folder, outcomes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_checkpoint_loads_on_any_ranks_under_any_plan(saved: Any, world_size: int) -> None:
    folder, expected = saved
    for ranks in run_on_ranks(load_all, world_size, folder):
        assert len(ranks) == len(WORLD_SIZES) * (3 * 3 + 2 * 2)
        for ((saved_on, saved_plan, optimizer), plan), (logits, losses) in ranks.items():
            case = f"{saved_on} {saved_plan} -> {world_size} {plan}, {optimizer}"
            saved_logits, next_losses = expected[saved_on, saved_plan, optimizer]
            assert torch.equal(logits, saved_logits), case
            assert losses == pytest.approx(next_losses, abs=1e-6), case
