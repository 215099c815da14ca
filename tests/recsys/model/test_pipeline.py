"""The pipeline that sends ids ahead gives the losses of the plain loop, and really is one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.train_pipeline import TrainPipelineBase

from embeddings.torchrec_internals import table_kernels
from recsys.build import Job, _pipeline, build_job
from recsys.config import EmbeddingSettings, TableSettings
from recsys.distributed.ranks import Ranks, joined_ranks
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
            loss_terms, _, _ = pipeline.progress(batches)
        except StopIteration:
            return losses
        losses.append(float(loss_terms["loss"]))


def train_every_way(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    ranks, data = ranks_of(rank, world_size), str(folder / "data")
    plain = build_job(em3_config(folder), data, ranks)
    base = TrainPipelineBase(plain.model, plain.pipeline.update.optimizer, ranks.device)
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
    job.model.eval()
    list(job.pipeline.outputs(iter(batches_of(job, NUM_BATCHES, 4))))
    assert not any(kernel.lxu_cache_locking_counter.any() for kernel in table_kernels(job.model))
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


class CountedCopies(DMPCollection):
    """Copies of tables on one rank, whose means are counted instead of taken."""

    means = 0

    def sync(self, include_optimizer_state: bool = True) -> None:
        type(self).means += 1


def test_copies_are_averaged_as_often_as_the_settings_say_through_the_pipeline(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path / "data")
    with joined_ranks("cpu") as ranks:
        job = build_job(em3_config(tmp_path), str(tmp_path / "data"), ranks)
        job.model.__class__, settings = CountedCopies, EmbeddingSettings()
        settings.parallel.sync_every_steps = 4
        config = replace(job.config, embedding=settings, accumulate_steps=1)
        pipeline = _pipeline(job.model, job.pipeline.update, config, ranks.device)
        job.model.train()
        list(pipeline.outputs(iter(batches_of(job, NUM_BATCHES, 4))))
    assert CountedCopies.means == 2  # after four steps and at the end


def test_validation_leaves_no_row_of_a_cache_locked(tmp_path: Path) -> None:
    """Caches need a GPU: locks are set here as a fetch ahead sets them, without a backward."""
    write_dataset(tmp_path / "data")
    with joined_ranks("cpu") as ranks:
        job = build_job(em3_config(tmp_path), str(tmp_path / "data"), ranks)
        kernels = list(table_kernels(job.model))
        for kernel in kernels:
            kernel.lxu_cache_locking_counter = torch.ones(2, 32, dtype=torch.int32)
        job.model.eval()
        list(job.pipeline.outputs(iter(batches_of(job, 2, 4))))
        assert kernels and not any(kernel.lxu_cache_locking_counter.any() for kernel in kernels)
