"""Sharded training equals plain PyTorch, whatever the plan and the number of ranks.

Two ranks take half of each batch and average their own loss; the gradients that reach the tables
must still be those of the whole batch's mean.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.distributed.types import EmbeddingModuleShardingPlan

from recsys.optimizer import DenseGroup, build_dense_optimizer
from tests.embeddings.tables_model import (
    BATCH,
    LABELS,
    STEPS,
    TablesModel,
    full_table,
    initial_tables,
    jagged,
    local_shards,
    rank_rows,
    sharded_model,
    table_configs,
    train_in_plain_pytorch,
)
from tests.ranks import RunsByWorldSize, rank_device, run_on_ranks

# Sharding, optimizer, and the table that is frozen, one of either collection.
CASES = [
    (sharding, optimizer, frozen)
    for sharding in ("row_wise", "table_wise", "column_wise")
    for optimizer, frozen in (("sgd", "tags"), ("rowwise_adagrad", ""), ("rowwise_adagrad", "item"))
]


@dataclass
class RankRun:
    """What one rank saw: its rows of the batch, its shards of the tables."""

    device: str
    logits: Tensor  # [steps, rows]
    last_shards: dict[str, list[tuple[list[int], Tensor]]]  # by table: offsets and weights
    dense: dict[str, Tensor]
    ranks_of_table: dict[str, set[int]]
    states: dict[str, list[str]]  # by table here: the tensors that its fused optimizer keeps


def train_all_cases(rank: int, world_size: int) -> dict[tuple[str, str, str], RankRun]:
    return {case: train(rank, world_size, *case) for case in CASES}


def train(
    rank: int,
    world_size: int,
    sharding: Any,
    optimizer: Any,
    frozen: str,
    kernel: Any = "fused",
    precision: Any = "fp32",
) -> RankRun:
    device, rows = rank_device(), rank_rows(rank, world_size)
    tables = table_configs(sharding, optimizer, None, kernel, frozen, precision)
    sharded = sharded_model(tables, device=device, batch_size=BATCH // world_size)
    combined, _ = build_dense_optimizer(sharded, [DenseGroup("all", [""], learning_rate=0.01)])
    labels = LABELS[:, rows].to(device)
    all_logits = []
    for step in range(STEPS):
        logits, _ = sharded(jagged(step, rows, device))
        all_logits.append(logits.detach().clone())
        combined.zero_grad()
        ((logits - labels[step]) ** 2).mean().backward()
        combined.step()
    dense = {
        name: value.detach().clone() for name, value in sharded.module.dense.named_parameters()
    }
    states = sharded.fused_optimizer.state_dict()["state"]
    return RankRun(
        device=device.type,
        logits=torch.stack(all_logits),
        last_shards=local_shards(sharded),
        dense=dense,
        ranks_of_table=ranks_of_table(sharded.plan),
        states={name.split(".")[-2]: list(state) for name, state in states.items()},
    )


def ranks_of_table(plan: Any) -> dict[str, set[int]]:
    result = {}
    for module_plan in plan.plan.values():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        for name, sharding in module_plan.items():
            result[name] = {shard.placement.rank() for shard in sharding.sharding_spec.shards}
    return result


@pytest.fixture(scope="module")
def runs(device: str) -> dict[int, list[dict[tuple[str, str, str], RankRun]]]:
    """By number of ranks: every rank's runs of every case."""
    return RunsByWorldSize(train_all_cases, device=device)


by_case = pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
by_world_size = pytest.mark.parametrize("world_size", [1, 2])


@by_world_size
@by_case
def test_logits_and_weights_equal_plain_pytorch(
    runs: dict[int, list[Any]], world_size: int, case: Any
) -> None:
    assert_equal_to_plain_pytorch([run[case] for run in runs[world_size]], *case)


def assert_equal_to_plain_pytorch(
    ranks: list[RankRun], sharding: str, optimizer: Any, frozen: str
) -> None:
    # Under column-wise sharding each column shard keeps its own row-wise moment.
    column_shards = len(ranks) if sharding == "column_wise" else 1
    device = ranks[0].device
    plain = train_in_plain_pytorch(optimizer, column_shards, device, frozen)
    # A GPU adds up in another order.
    close = {"rtol": 0, "atol": 1e-6 if device == "cpu" else 1e-5}
    logits = torch.cat([run.logits for run in ranks], dim=1)
    torch.testing.assert_close(logits, plain.logits, **close)
    start = initial_tables(device)
    for name in ("user", "tags", "item"):
        table = full_table([shard for run in ranks for shard in run.last_shards[name]])
        torch.testing.assert_close(table, plain.weights[name], **close)
        if name == frozen:
            assert torch.equal(table, start[name])
            assert not any(run.states.get(name) for run in ranks)
        else:
            assert not torch.allclose(table, start[name], atol=1e-3)
    for run in ranks:
        for name, value in run.dense.items():
            torch.testing.assert_close(value, plain.weights[f"dense.{name}"], **close)


@pytest.mark.gpu
@by_world_size
@pytest.mark.parametrize("kernel", ["uvm", "uvm_caching"])
def test_rows_in_host_memory_equal_plain_pytorch(kernel: str, world_size: int) -> None:
    for case in CASES:
        ranks = run_on_ranks(train, world_size, *case, kernel, device="cuda")
        assert_equal_to_plain_pytorch(ranks, *case)


@by_world_size
@pytest.mark.parametrize("case", CASES[1::3], ids=["-".join(case) for case in CASES[1::3]])
def test_tables_of_half_precision_train_as_whole_ones_but_for_rounding(
    device: str, world_size: int, case: Any
) -> None:
    sharding, optimizer, frozen = case
    ranks = run_on_ranks(train, world_size, *case, "fused", "fp16", device=device)
    columns = world_size if sharding == "column_wise" else 1
    full_tables = train_in_plain_pytorch(optimizer, columns, ranks[0].device, frozen)
    logits = torch.cat([run.logits for run in ranks], dim=1)
    torch.testing.assert_close(logits, full_tables.logits, rtol=0, atol=4e-3)
    for name in ("user", "tags", "item"):
        shards = [shard for run in ranks for shard in run.last_shards[name]]
        assert {shard.dtype for _, shard in shards} == {torch.float16}
        table = full_table(shards)
        assert not torch.equal(table, full_tables.weights[name])
        torch.testing.assert_close(table, full_tables.weights[name], rtol=0, atol=5e-4)


def test_table_wise_tables_are_spread_but_not_cut(runs: dict[int, list[Any]]) -> None:
    table_ranks = runs[2][0]["table_wise", "sgd", "tags"].ranks_of_table
    assert all(len(ranks) == 1 for ranks in table_ranks.values())
    assert set.union(*table_ranks.values()) == {0, 1}


def shard_real_weights(rank: int, world_size: int) -> dict[str, dict[str, list[Any]]]:
    shards = {}
    for sharding in ("row_wise", "column_wise"):
        tables = table_configs(sharding)  # type: ignore[arg-type]
        model = TablesModel(tables, device="cpu")
        with torch.no_grad():
            for parameter in [*model.bags.parameters(), *model.sequences.parameters()]:
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
        shards[sharding] = local_shards(sharded_model(tables, model))
    return shards


def test_weights_that_a_table_already_has_survive_sharding() -> None:
    ranks = run_on_ranks(shard_real_weights, 2)
    for sharding in ("row_wise", "column_wise"):
        for name, rows in (("user", 10), ("tags", 3), ("item", 7)):
            table = full_table([shard for rank in ranks for shard in rank[sharding][name]])
            assert torch.equal(table, torch.arange(rows * 8.0).view(rows, 8))
