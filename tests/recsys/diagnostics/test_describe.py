"""What `describe` says before a run is what the run then has: parameters, bytes, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.simulated_cluster import DEVICES, Cluster, Device
from recsys.build import Job, build_job
from recsys.cli import main
from recsys.config import (
    Config,
    ContentSettings,
    EmbeddingSettings,
    HardwareSettings,
    NeighbourSettings,
    TableSettings,
    content_settings,
)
from recsys.data.vocabularies import UnknownIds
from recsys.diagnostics.plan.description import Description, describe
from recsys.optimizer.dense import dense_parameters
from recsys.ranking.attention_models import DinDcnSettings
from recsys.ranking.neighbours import FOLDS
from recsys.training.train import training_interactions
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY
from tests.recsys.em3_runs import em3_config, ranks_of

SHARDINGS = {"row_wise": "sharded", "table_wise": "replicated"}  # with the bank's placement
CPU = Device("cpu", "cpu", 2**33)
CLUSTER = ["--nodes", "8", "--gpus-per-node", "8", "--device", "h100"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("describe")
    rows = {"train": 320, "valid": 24, "test": 20}
    write_dataset(root / "data", rows, num_users=50, num_items=300)
    return root


def config_of(folder: Path, sharding: Any) -> Config:
    tables = EmbeddingSettings(32, sharding, "rowwise_adagrad")
    config = em3_config(folder, embedding=tables, batch_size=64, kernels="torch")
    if sharding == "table_wise":
        assert isinstance(config.ranking, DinDcnSettings)
        config.ranking.ensemble_members, config.ranking.standardize_numbers = 3, True
        config.optimizer.ema_decay, config.optimizer.ema_tables = 0.9, True
    assert isinstance(config.content, ContentSettings)
    config.content.history.bank = SHARDINGS[sharding]  # type: ignore[assignment]
    return config


def described(folder: Path, config: Config, ranks: int = 1, **rows: int) -> Description:
    return describe(config, str(folder / "data"), Cluster(1, ranks, CPU), rows)


def command(folder: Path, *argv: str) -> int:
    data = str(folder / "data")
    return main(["describe", "--config", str(TINY), "--data", data, *argv])


def measured(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each sharding: parameters and bytes on this rank after a step."""
    return {sharding: _measured(rank, world_size, folder, sharding) for sharding in SHARDINGS}


def _measured(rank: int, world_size: int, folder: Path, sharding: str) -> dict[str, Any]:
    config = config_of(folder, sharding)
    job = build_job(config, str(folder / "data"), ranks_of(rank, world_size))
    batches = iter(training_interactions(job))
    loss, _ = job.model(next(job.preparation(batches, UnknownIds(job.schema), 0, training=True)))
    loss.backward()
    job.dense_optimizer.step()  # moments begin with the first update
    averages = {} if job.averages is None else job.averages.state_dict()
    dense_averages = [averages[name] for name in dense_parameters(job.em3) if name in averages]
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
        )
        + sum(average.nbytes for average in dense_averages),
        "tables": _shard_bytes(job.model.state_dict()) + _shard_bytes(averages),
        "table_states": _shard_bytes(job.model.fused_optimizer.state_dict()["state"]),
        "bank": _bank_bytes(job),
    }


def _shard_bytes(state: Any) -> int:
    """Of all sharded tensors in a state, the shards on this rank."""
    if isinstance(state, ShardedTensor):
        return sum(p.tensor.numel() * p.tensor.element_size() for p in state.local_shards())
    if isinstance(state, dict):
        return sum(map(_shard_bytes, state.values()))
    return 0


def _bank_bytes(job: Job) -> int:
    assert job.em3.content is not None and job.em3.content.bank is not None
    return job.em3.content.bank.num_bytes


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(measured, 2, folder)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_run_has_what_was_said(runs: Any, folder: Path, sharding: str) -> None:
    ranks = [rank[sharding] for rank in runs]
    description = described(folder, config_of(folder, sharding), len(ranks))
    dense = [part for part in description.parts if part.where == "every rank"]

    assert sum(part.parameters for part in dense) == ranks[0]["dense"]
    assert sum(p.parameters for p in dense if p.state_bytes) == ranks[0]["trained"]
    assert sum(part.state_bytes for part in dense) == ranks[0]["moments"]
    tables = [rank["tables"] + rank["table_states"] for rank in ranks]
    assert description.table_bytes == tables
    assert description.memory.tables == max(tables)
    assert description.memory.bank == max(rank["bank"] for rank in ranks)


def test_a_laptop_plans_four_billion_rows_over_64_gpus(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "item=4_000_000_000", "--embedding.dim", "128"]
    out = folder / "numbers" / "plan.json"
    assert command(folder, *CLUSTER, *sizes, "--json", str(out)) == 0

    numbers = json.loads(out.read_text())
    assert numbers["world_size"] == 64 and not numbers["problems"]
    (item,) = [part for part in numbers["parts"] if part["name"] == "table item"]
    assert item["parameters"] == 4_000_000_000 * 128
    assert item["weight_bytes"] == 62_500_000 * 128 * 4
    assert item["state_bytes"] == 62_500_000 * 4
    # The bank: a content vector, a mean token of the one modality, and its age, per row.
    assert numbers["memory"]["bank"] == 62_500_000 * (16 + 16 + 1) * 4
    printed = capsys.readouterr().out
    assert "64 ranks (8 x 8) on h100" in printed
    assert "row_wise on 64 ranks" in printed and "\nfits: " in printed


def test_what_fits_only_without_averages_of_tables_is_a_problem(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "item=1_500_000_000", "--embedding.dim", "512"]
    averaged = ["--optimizer.ema_decay", "0.9", "--optimizer.ema_tables", "true"]
    problems = []
    for words in ([], averaged):
        out = folder / "numbers" / "averages.json"
        assert command(folder, *CLUSTER, *sizes, *words, "--json", str(out)) == 0
        problems.append(json.loads(out.read_text())["problems"])
    assert problems[0] == [] and "most is tables" in problems[1][0]
    assert f"does not fit\n  {problems[1][0]}" in capsys.readouterr().out


def test_host_memory_and_copies_of_tables_are_planned(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "item=4_000_000_000", "--embedding.dim", "128"]
    item = "{item: {kernel: uvm_caching, cache_load_factor: 0.1}}"
    assert command(folder, *CLUSTER, *sizes, "--embedding.tables", item) == 0
    printed = capsys.readouterr().out
    assert "ranks, in host" in printed and "fused_uvm_caching" in printed
    assert "\ntables in host" in printed and "\nfits: " in printed

    out = folder / "numbers" / "copies.json"
    copies = ["--embedding.parallel.copies", "8", "--rows", "item=1_000_000_000"]
    assert command(folder, *CLUSTER, *copies, "--json", str(out)) == 0
    assert len(json.loads(out.read_text())["table_bytes"]) == 8  # ranks that share a copy

    on_host = EmbeddingSettings(16, tables={"item": TableSettings(kernel="uvm")})
    with pytest.raises(ValueError, match=r"embedding\.tables\.item\.kernel is uvm, .* cpu"):
        described(folder, em3_config(folder, embedding=on_host))


@pytest.mark.parametrize("kernel", ["fused", "uvm", "uvm_caching"])
@pytest.mark.parametrize("rows", [400_000_000, 1_000_000_000])
def test_auto_spreads_large_tables_over_all_ranks_and_is_never_slower_than_row_wise(
    folder: Path, rows: int, kernel: Any
) -> None:
    times = {}
    for sharding in ("auto", "row_wise"):
        settings = TableSettings(kernel=kernel)
        tables = EmbeddingSettings(128, sharding, tables={"item": settings})  # type: ignore[arg-type]
        config = em3_config(folder, content="none", embedding=tables)
        config.contrastive.weight = 0.0
        cluster = Cluster(1, 8, DEVICES["h100"])
        description = describe(config, str(folder / "data"), cluster, {"item": rows})
        (item,) = [part for part in description.parts if part.name == "table item"]
        assert item.where.startswith("row_wise on 8 ranks") and not description.problems
        assert description.times is not None
        assert (description.times.host_link > 0) == (kernel != "fused")
        times[sharding] = description.times.total
    assert times["auto"] <= times["row_wise"]


def test_settings_replace_the_bandwidths_of_a_device(folder: Path) -> None:
    times = {}
    for host_link in (None, 6.4):
        hardware = HardwareSettings(host_link_gb_per_s=host_link, reserved_share=0.5)
        tables = {"item": TableSettings(kernel="uvm")}
        config = em3_config(folder, embedding=EmbeddingSettings(tables=tables, hardware=hardware))
        cluster = Cluster(1, 2, DEVICES["h100"])
        description = describe(config, str(folder / "data"), cluster)
        assert description.times is not None
        assert description.cluster.device.hardware.memory == 3350
        assert description.cluster.device.hardware.reserved_share == 0.5
        times[host_link] = description.times.host_link
    assert times[6.4] == pytest.approx(10 * times[None])


def test_what_does_not_fit_is_said_by_table_with_what_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = ["--device", "a100", "--memory-bytes", "1e9"]
    assert command(folder, *memory, "--rows", "item=50000000", "--content", "none") == 0

    printed = capsys.readouterr().out
    assert "\n  table 'item' (50,000,000 x 16, rowwise_adagrad, auto) " in printed
    assert ": 5 ranks" in printed
    assert ": num_embeddings 12," in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "h1000"], "device 'h1000' is unknown"),
        (["--device", "cuda"], "device is cuda"),
        (["--device", "h100", "--nodes", "1000000000"], "nodes is 1000000000"),
        (["--device", "h100", "--rows", "shoes=5"], "rows: 'shoes'"),
        (["--device", "h100", "--rows", "item"], "rows: 'item' is not TABLE=NUMBER"),
    ],
)
def test_mistakes_are_named(
    folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("a GPU is usable")
    assert command(folder, *argv) == 1
    assert message in capsys.readouterr().err


def test_layers_of_an_encoder_that_are_cached_leave_the_run(folder: Path) -> None:
    config = em3_config(folder)
    content = content_settings(config.content)
    assert content is not None
    modality = replace(content.modalities["text"], cache_frozen_layers=False)
    modalities = {**content.modalities, "text": modality}
    full = described(folder, replace(config, content=replace(content, modalities=modalities)))
    cached = described(folder, config)

    parameters = [sum(part.parameters for part in one.parts) for one in (full, cached)]
    assert parameters[0] == parameters[1] + cached.frozen_layers["text"]


def test_runs_without_content_and_frozen_tables_are_described(folder: Path) -> None:
    tables = EmbeddingSettings(dim=16, skip=["user"])
    config = em3_config(folder, content="none", embedding=tables)
    config.contrastive.weight = 0.0
    description = described(folder, config)

    assert description.memory.bank == 0
    assert {part.name.split()[0] for part in description.parts} == {"table", "ranking"}


def test_statistics_of_neighbours_grow_with_the_items(folder: Path) -> None:
    config = em3_config(folder, content="none", neighbours=NeighbourSettings())
    config.contrastive.weight = 0.0
    for num_items in (300, 3_000):
        description = described(folder, config, item=num_items)
        (size,) = [
            part.bytes for part in description.parts if part.name == "statistics of neighbours"
        ]
        # Factors, counts and sums of each item, for each fold of users and for all of them.
        assert size == num_items * (FOLDS + 1) * (32 + 2) * 4
