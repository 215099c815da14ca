"""Rows of sharded tables under every plan: averaged, filled and reset.

A reset never changes a batch that is still in the pipeline.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embeddings.table_rows as row_reset_module
from embeddings import TableConfig
from embeddings.table_rows import RowReset, TableRows, TableShard
from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.optimizer import DenseGroup, build_dense_optimizer
from tests.embeddings.tables_model import (
    DIM,
    SEED,
    TablesModel,
    full_table,
    initial_tables,
    jagged,
    local_shards,
    sharded_model,
    table_configs,
)
from tests.ranks import run_on_ranks

PLANS = [
    ("row_wise", "rowwise_adagrad"),
    ("table_wise", "adagrad"),
    ("column_wise", "rowwise_adagrad"),
    ("column_wise", "sgd"),
]
RESET = {"user": [0, 9], "item": [3, 6]}  # on either rank under row-wise sharding


class PipelinedModel(TablesModel):
    def forward(self, ids: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits, _ = super().forward(ids)
        return logits.square().mean(), logits


def with_optimizer(tables: list[TableConfig]) -> tuple[DistributedModelParallel, Any]:
    sharded = sharded_model(tables, PipelinedModel(tables))
    return sharded, build_dense_optimizer(sharded, [DenseGroup("all", [""])])[0]


def train_step(model: nn.Module, combined: Any, batch: KeyedJaggedTensor) -> Tensor:
    combined.zero_grad()
    loss, logits = model(batch)
    loss.backward()
    combined.step()
    return logits.detach()


def shards_of(states: dict[str, Any]) -> list[tuple[str, list[int], Tensor]]:
    """Name, offsets and copy of every shard on this rank."""
    return [
        (name, list(shard.metadata.shard_offsets), shard.tensor.detach().clone())
        for name, value in sorted(states.items())
        if hasattr(value, "local_shards")
        for shard in value.local_shards()
    ]


def state_of(model: DistributedModelParallel) -> dict[str, list[tuple[str, list[int], Tensor]]]:
    moments = {
        name: value
        for states in model.fused_optimizer.state_dict()["state"].values()
        for name, value in states.items()
    }
    return {"weights": shards_of(model.state_dict()), "moments": shards_of(moments)}


def train_and_reset(rank: int, world_size: int) -> dict[tuple[str, str], Any]:
    states = {}
    for plan in PLANS:
        sharding: Any = plan[0]
        optimizer: Any = plan[1]
        tables = table_configs(sharding, optimizer)
        model, combined = with_optimizer(tables)
        for step in range(2):
            train_step(model, combined, jagged(step, slice(rank, 4, world_size)))
        old_state = state_of(model)
        reset = RowReset(model, tables, seed=SEED)
        for table, rows in RESET.items():
            reset(table, torch.tensor(rows))
        states[plan] = old_state, state_of(model)
    return states


@pytest.fixture(scope="module")
def resets() -> list[dict[tuple[str, str], Any]]:
    return run_on_ranks(train_and_reset, 2)


@pytest.mark.parametrize("plan", PLANS, ids="-".join)
def test_reset_rows_have_initial_weights_and_no_moments_and_others_stay(
    resets: list[dict[tuple[str, str], Any]], plan: tuple[str, str]
) -> None:
    initial = initial_tables()
    reset_rows = set()
    for rank in resets:
        old_shards, new_shards = (state["weights"] for state in rank[plan])
        for (key, (row, column), old), (_, _, new) in zip(old_shards, new_shards, strict=True):
            table = key.split(".")[-2]
            rows = [index - row for index in RESET.get(table, []) if row <= index < row + len(old)]
            columns = slice(column, column + old.shape[1])
            start = initial[table][row : row + len(old), columns]
            assert not any(torch.equal(old[index], start[index]) for index in rows)
            assert torch.equal(new[rows], start[rows])
            other_rows = [index for index in range(len(old)) if index not in rows]
            assert torch.equal(new[other_rows], old[other_rows])
            reset_rows |= {(table, row + index, column) for index in rows}
    starts = (0, 4) if plan[0] == "column_wise" else (0,)
    assert reset_rows == {
        (table, row, c) for table in RESET for row in RESET[table] for c in starts
    }
    for rank in resets:
        weights, old_shards, new_shards = (
            rank[plan][0]["weights"],
            rank[plan][0]["moments"],
            rank[plan][1]["moments"],
        )
        offsets = {key.split(".")[-2]: row for key, (row, _), _ in weights}
        assert bool(old_shards) == (plan[1] != "sgd" and bool(weights))
        for (name, _, old), (_, _, new) in zip(old_shards, new_shards, strict=True):
            table = name.split(".")[0]
            rows = [
                row - offsets[table]
                for row in RESET.get(table, [])
                if offsets[table] <= row < offsets[table] + len(old)
            ]
            assert (old[rows] > 0).any() or not rows
            expected = old.clone()
            expected[rows] = 0
            assert torch.equal(new, expected)


def test_rows_beyond_the_first_block_take_turns_with_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_reset_module, "INITIALIZATION_BLOCK_ROWS", 4)
    weight, initial = torch.zeros(10, 8), initial_tables()["user"]
    shard = TableShard(weight, [], row=0, column=0)
    monkeypatch.setattr(row_reset_module, "local_shards", lambda model: [("user", shard)])
    reset = RowReset(nn.Module(), table_configs()[:1], seed=SEED)  # type: ignore[arg-type]
    state = torch.random.get_rng_state()
    reset("user", torch.tensor([1, 9]))
    assert torch.equal(weight[[1, 9]], initial[[1, 1]])
    assert torch.equal(torch.random.get_rng_state(), state)


# What a pipeline may not do: run a batch with rows that a later batch was given already.
USERS = 9  # rows for known ids, of which each step uses three
STEPS = 12


def mapped_batches(
    model: DistributedModelParallel, sharding: Any, rank: int, world_size: int
) -> Iterator[KeyedJaggedTensor]:
    """Batches of users that come and go, their rows reset as they are mapped."""
    tables = table_configs(sharding, "rowwise_adagrad")
    vocabulary = BoundedVocabulary(USERS + 1, process_group=dist.group.WORLD)
    reset = RowReset(model, tables, seed=SEED)
    evictions = 0
    for step in range(STEPS):
        batch = jagged(step % 3, slice(rank, 4, world_size))
        users = torch.arange(len(batch["user"].values())) % 2 + 2 * rank + 3 * step
        rows = vocabulary.rows_of(users, step, training=True)
        evicted = vocabulary.take_evicted_rows()
        reset("user", evicted)
        evictions += len(evicted)
        values = torch.cat([rows, batch.values()[len(rows) :]])
        yield KeyedJaggedTensor(batch.keys(), values, lengths=batch.lengths())
    assert evictions > USERS


def train_ahead_and_in_turn(rank: int, world_size: int) -> list[tuple[Any, Any]]:
    results = []
    for sharding in ("row_wise", "column_wise"):
        ends = []
        for ahead in (True, False):
            tables = table_configs(sharding, "rowwise_adagrad")
            model, combined = with_optimizer(tables)
            batches = mapped_batches(model, sharding, rank, world_size)
            if ahead:
                pipeline = TrainPipelineSparseDist(model, combined, torch.device("cpu"))
                logits = []
                while True:
                    try:
                        logits.append(pipeline.progress(batches).detach())
                    except StopIteration:
                        break
            else:
                logits = [train_step(model, combined, batch) for batch in batches]
            ends.append((torch.cat(logits), state_of(model)))
        results.append((ends[0], ends[1]))
    return results


def test_a_pipeline_that_maps_batches_ahead_trains_as_one_that_does_not() -> None:
    for rank in run_on_ranks(train_ahead_and_in_turn, 2):
        for (logits, state), (expected_logits, expected_state) in rank:
            torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0)
            for key in ("weights", "moments"):
                for (_, _, value), (_, _, expected) in zip(
                    state[key], expected_state[key], strict=True
                ):
                    assert torch.equal(value, expected)


SHARDINGS = ["row_wise", "table_wise", "column_wise"]


def rows_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    result = {}
    for sharding in SHARDINGS:
        model, combined = with_optimizer(table_configs(sharding, "rowwise_adagrad"))
        untrained = TableRows(model, "item", group).mean()
        train_step(model, combined, jagged(1, slice(rank, 4, world_size)))
        rows = TableRows(model, "item", group)
        old_shards, mean = local_shards(model)["item"], rows.mean()
        rows.fill_untrained(torch.arange(DIM))
        new_shards, new_mean = local_shards(model)["item"], TableRows(model, "item", group).mean()
        result[sharding] = untrained, old_shards, mean, new_shards, new_mean
    return result


@pytest.fixture(scope="module")
def row_results() -> list[dict[str, Any]]:
    return run_on_ranks(rows_on_rank, 2)


def plan_rows(values: list[dict[str, Any]], sharding: str, position: int) -> Tensor:
    return full_table([shard for rank in values for shard in rank[sharding][position]])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_rows_are_averaged_and_those_without_training_filled(
    row_results: list[dict[str, Any]], sharding: str
) -> None:
    old_rows, new_rows = plan_rows(row_results, sharding, 1), plan_rows(row_results, sharding, 3)
    changed = (old_rows != initial_tables()["item"]).any(dim=1).nonzero().flatten().tolist()
    for rank in row_results:
        untrained, _, (mean, count), _, again = rank[sharding]
        assert untrained[1] == 0
        assert count == again[1] == len(changed)  # values alone do not train a row
        torch.testing.assert_close(mean, old_rows[changed].double().mean(dim=0))
    expected = old_rows.clone()
    expected[[row for row in range(7) if row not in changed]] = torch.arange(DIM).float()
    assert torch.equal(new_rows, expected)
