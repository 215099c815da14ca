"""The pipeline that sends ids ahead gives the losses of the plain loop, and really is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineBase

from recsys.build import Job, build_job
from recsys.config import TableSettings
from recsys.distributed.ranks import Ranks
from recsys.distributed.torchrec_internals import require_pipelined
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import TABLES, batches_of, em3_config, ranks_of

NUM_BATCHES = 6


def losses_of(job: Job, pipeline: Any) -> list[float]:
    batches = iter(batches_of(job, NUM_BATCHES, 4))
    losses: list[float] = []
    job.model.train()
    while True:
        try:
            parts, _, _ = pipeline.progress(batches)
        except StopIteration:
            return losses
        losses.append(float(parts["loss"]))


def train_every_way(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    ranks, data = ranks_of(rank, world_size), str(folder / "data")
    plain = build_job(em3_config(folder), data, ranks)
    base = TrainPipelineBase(plain.model, plain.optimizer, ranks.device)
    job = build_job(em3_config(folder), data, ranks)
    result: dict[str, Any] = {
        "plain": losses_of(plain, base),
        "ahead": losses_of(job, job.pipeline),
        "unpipelined": complaint(plain.model),
    }
    require_pipelined(job.model)
    if ranks.device.type == "cuda":
        result["prefetched"] = losses_of_prefetching(folder, ranks)
    return result


def losses_of_prefetching(folder: Path, ranks: Ranks) -> list[float]:
    """With the rows of the next batch fetched into caches."""
    config = em3_config(folder)
    config.embedding.prefetch = True
    config.embedding.tables = {name: TableSettings(kernel="uvm_caching") for name in TABLES}
    job = build_job(config, str(folder / "data"), ranks)
    losses = losses_of(job, job.pipeline)
    require_pipelined(job.model)
    return losses


def complaint(model: torch.nn.Module) -> str:
    try:
        require_pipelined(model)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def results(device: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pipeline")
    write_dataset(folder / "data")
    return run_on_ranks(train_every_way, 2, folder, device=device)


def test_sending_ids_ahead_gives_the_losses_of_the_plain_loop(results: Any) -> None:
    for rank in results:
        assert len(rank["plain"]) == NUM_BATCHES
        assert rank["ahead"] == rank["plain"] == rank.get("prefetched", rank["plain"])
        assert len(set(rank["plain"])) == NUM_BATCHES


def test_a_collection_that_is_not_pipelined_is_named(results: Any) -> None:
    for rank in results:
        assert "'_dmp_wrapped_module.module.embedding_bags' " in rank["unpipelined"]
