"""The pipeline that sends ids ahead gives the losses of the plain loop, and really is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineBase

from recsys.build import Job, build_job
from recsys.config import TableSettings
from recsys.data.batch import Batch
from recsys.distributed.pipeline import PrefetchingPipeline
from recsys.distributed.ranks import Ranks
from recsys.distributed.torchrec_internals import require_pipelined
from recsys.model.em3 import EM3
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
        "prefetched": losses_of_prefetching(folder, ranks),
    }
    require_pipelined(job.model)
    result["unpipelined"] = complaint(plain.model)
    result["indirect"] = complaint_about_an_indirect_input(
        build_job(em3_config(folder), data, ranks)
    )
    return result


class WithoutStreams(PrefetchingPipeline):
    """Prefetches on CPU, where TorchRec does nothing in this stage and then fails."""

    def _prefetch(self, context: Any) -> None:
        for module in self._pipelined_modules:
            name = module.forward._name
            data = context.input_dist_tensors_requests.pop(name).wait()
            module_context = context.module_contexts.pop(name)
            module.prefetch(ctx=module_context, dist_input=data, forward_stream=None)
            context.module_input_post_prefetch[name] = data
            context.module_contexts_post_prefetch[name] = module_context


def losses_of_prefetching(folder: Path, ranks: Ranks) -> list[float]:
    """With the rows of the next batch fetched into caches, where the device has them."""
    config = em3_config(folder)
    if ranks.device.type == "cuda":
        config.embedding.prefetch = True
        config.embedding.tables = {name: TableSettings(kernel="uvm_caching") for name in TABLES}
    job = build_job(config, str(folder / "data"), ranks)
    if ranks.device.type == "cpu":
        job.pipeline = WithoutStreams(job.model, job.update, ranks.device)
    losses = losses_of(job, job.pipeline)
    require_pipelined(job.model)
    return losses


def complaint(model: torch.nn.Module) -> str:
    try:
        require_pipelined(model)
    except RuntimeError as error:
        return str(error)
    return ""


class SwappedFeatures(EM3):
    """Hands the item table something computed, which no pipeline can send ahead."""

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor, Batch]]:
        assert self.embedding_bags is not None
        pooled = self.embedding_bags(batch.sparse_features)
        keys = [1, 0]
        sequences = self.embeddings(batch.sequence_features.permute(keys).permute(keys))
        ids = self.read_ids(pooled, sequences, batch)
        content = self.content(batch) if self.content is not None else None
        logits = self.ranking(ids, content, batch)
        loss, parts, logits = self.losses(logits, ids, content, batch)
        return loss, (parts, logits, batch)


def complaint_about_an_indirect_input(job: Job) -> str:
    job.em3.__class__ = SwappedFeatures
    losses_of(job, job.pipeline)
    return complaint(job.model)


@pytest.fixture(scope="module")
def results(device: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pipeline")
    write_dataset(folder / "data")
    return run_on_ranks(train_every_way, 2, folder, device=device)


def test_sending_ids_ahead_gives_the_losses_of_the_plain_loop(results: Any) -> None:
    for rank in results:
        assert len(rank["plain"]) == NUM_BATCHES
        assert rank["ahead"] == rank["plain"] == rank["prefetched"]
        assert len(set(rank["plain"])) == NUM_BATCHES


def test_a_collection_that_is_not_pipelined_is_named(results: Any) -> None:
    for rank in results:
        assert "'_dmp_wrapped_module.module.embedding_bags' " in rank["unpipelined"]
        assert "module.embeddings' " in rank["indirect"]
