"""What `describe` says before a run is what the run then has: parameters, bytes, FLOPs, traffic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.profiler import ProfilerActivity, profile

from embeddings.device_figures import DeviceFigures
from embeddings.simulated_cluster import Cluster
from embeddings.table_memory import FLOAT
from recsys.build import Job, build_job
from recsys.config import Config, ContentSettings, EmbeddingSettings, ModalitySettings
from recsys.data.batch import Batch
from recsys.data.filesystem import Location
from recsys.data.schema import load_schema
from recsys.data.vocabularies import UnknownIds
from recsys.diagnostics.cost.counted import WorkCounter
from recsys.diagnostics.plan.description import Description, describe
from recsys.diagnostics.plan.item_sample import sample_items
from recsys.diagnostics.profile.collective_trace import read_collectives
from recsys.ranking.din import DinDcnSettings
from recsys.training.train import training_interactions
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import all_texts_run, em3_config, ranks_of

ROWS = {"train": 640, "valid": 24, "test": 20}
STEPS = 10  # an epoch of one rank, two of two ranks
SHARDINGS = {"row_wise": "sharded", "table_wise": "replicated"}  # with the bank's placement
CPU = DeviceFigures("cpu", "cpu", 2**33, 1e10, 1e11, 1e11, 1e10, 1e9)


def config_of(folder: Path, sharding: Any = "row_wise", **settings: Any) -> Config:
    tables = EmbeddingSettings(32, sharding, "rowwise_adagrad")
    config = em3_config(folder, embedding=tables, batch_size=64, kernels="torch", **settings)
    if sharding == "table_wise":
        assert isinstance(config.ranking, DinDcnSettings)
        config.ranking.ensemble_members, config.ranking.standardize_numbers = 3, True
    content = config.content
    assert isinstance(content, ContentSettings)
    text = replace(
        content.modalities["text"], lora=replace(content.modalities["text"].lora, rank=4)
    )
    content.modalities["text"] = text
    content.history.bank = SHARDINGS[sharding]
    return config


def measured(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each sharding: parameters and bytes on this rank, FLOPs of a sample, bytes sent."""
    return {sharding: _measured(rank, world_size, folder, sharding) for sharding in SHARDINGS}


def _measured(rank: int, world_size: int, folder: Path, sharding: str) -> dict[str, Any]:
    config = config_of(folder, sharding)
    job = build_job(config, str(folder / "data"), ranks_of(rank, world_size))
    batches = iter(training_interactions(job))
    prepared = job.preparation(batches, UnknownIds(job.schema), 0, training=True)
    steps = [_step(job, prepared, folder) for _ in range(STEPS // world_size)]
    job.dense_optimizer.step()  # moments begin with the first update
    return {
        "dense": sum(
            p.numel() for n, p in job.em3.named_parameters() if not n.startswith("embedding")
        ),
        "trained": sum(p.numel() for g in job.dense_optimizer.param_groups for p in g["params"]),
        "moments": sum(
            value.numel() * value.element_size()
            for state in job.dense_optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        ),
        "tables": _bytes_of_pieces(job.model.state_dict()),
        "table_states": _bytes_of_pieces(job.model.fused_optimizer.state_dict()["state"]),
        "bank": _bank_bytes(job),
        **{name: fmean(step[name] for step in steps) for name in steps[0]},
    }


def _step(job: Job, prepared: Iterator[Batch], folder: Path) -> dict[str, float]:
    """What PyTorch counts of a step, which is made twice."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        batch = next(prepared)
        loss, _ = job.model(batch)
        loss.backward()
        job.ranks.gather(None)  # gloo notes the end of one when it begins the next
    with WorkCounter() as forward, all_texts_run():
        loss, _ = job.model(batch)
    with WorkCounter() as backward:
        loss.backward()
    path = folder / f"{job.ranks.rank}.json"
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    collectives = read_collectives(events, job.ranks.rank, job.ranks.world_size)
    return {
        "forward": forward.work().products / batch.batch_size,
        "backward": backward.work().products / batch.batch_size,
        "sent": sum(collective.bytes_sent for _, collective in collectives),
    }


def _bytes_of_pieces(state: Any) -> int:
    """Of all sharded tensors in a state, the pieces on this rank."""
    if isinstance(state, ShardedTensor):
        return sum(p.tensor.numel() * p.tensor.element_size() for p in state.local_shards())
    if isinstance(state, dict):
        return sum(map(_bytes_of_pieces, state.values()))
    return 0


def _bank_bytes(job: Job) -> int:
    assert job.em3.content is not None and job.em3.content.bank is not None
    return job.em3.content.bank.num_bytes


def described(folder: Path, sharding: Any, world_size: int) -> Description:
    return describe(config_of(folder, sharding), str(folder / "data"), Cluster(1, world_size, CPU))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("describe")
    write_dataset(place / "data", ROWS, num_users=50, num_items=300)
    return place


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.long), 2])
def runs(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """What each rank of a run has."""
    return run_on_ranks(measured, request.param, folder)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_run_has_what_was_said(runs: Any, folder: Path, sharding: str) -> None:
    ranks = [rank[sharding] for rank in runs]
    found = described(folder, sharding, len(ranks))
    dense = [part for part in found.parts if part.where == "every rank"]

    assert sum(part.parameters for part in dense) == ranks[0]["dense"]
    assert sum(p.parameters for p in dense if p.state_bytes) == ranks[0]["trained"]
    assert sum(part.state_bytes for part in dense) == ranks[0]["moments"]
    tables = [rank["tables"] + rank["table_states"] for rank in ranks]
    assert found.table_bytes == tables
    assert found.memory.tables == max(tables)
    assert found.memory.bank == max(rank["bank"] for rank in ranks)
    for way in ("forward", "backward"):
        expected = sum(getattr(part, way).products for part in found.costs) / found.counts.rows
        assert expected == pytest.approx(fmean(rank[way] for rank in ranks), rel=0.02)
    sent = sum(kind.bytes for kind in found.sent)
    assert sent == pytest.approx(fmean(rank["sent"] for rank in ranks), rel=0.02)


def test_weights_are_counted_once_over_all_ranks(folder: Path) -> None:
    one, four = (described(folder, "row_wise", ranks) for ranks in (1, 4))

    assert [part.parameters for part in one.parts] == [part.parameters for part in four.parts]
    assert sum(one.table_bytes) == sum(four.table_bytes)
    weights = sum(part.parameters for part in one.parts if part.name.startswith("table "))
    moments = 50 + 300 + 5  # one per row
    assert sum(one.table_bytes) == FLOAT * (weights + moments)


def test_items_without_rows_and_a_schema_without_items_are_named(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    root = Location.of(data)
    file = data / "items" / "part-0.parquet"
    items = pq.read_table(file)
    pq.write_table(items.slice(0, 0), data / "items" / "part-1.parquet")
    clip = {"clip": ModalitySettings("feature", "clip")}
    assert sample_items(root, load_schema(root), clip).num_items == 30  # one file has rows
    pq.write_table(items.slice(0, 0), file)
    with pytest.raises(ValueError, match=r"data/items: no .*with rows"):
        sample_items(root, load_schema(root), clip)
    schema = load_schema(root)
    schema.items = None
    with pytest.raises(ValueError, match=r"data/schema\.yaml: .*`items`"):
        sample_items(root, schema, clip)
