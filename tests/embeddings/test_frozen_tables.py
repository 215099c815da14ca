"""Tables that stand still or move at their own rate, under every plan; tiny ones too."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings import TableConfig
from recsys.optimizer import DenseGroup, build_dense_optimizer
from tests.embeddings.tables_model import (
    BATCH,
    LABELS,
    SEED,
    STEPS,
    TablesModel,
    initial_tables,
    jagged,
    local_shards,
    rank_rows,
    sharded_model,
    table_configs,
    whole_table,
)
from tests.ranks import run_on_ranks

# By table: its learning rate, or None where it is frozen. Both kinds of collections have a frozen
# table in one of the two, and `tags` has three rows.
RATES: list[dict[str, float | None]] = [
    {"user": 0.5, "tags": None, "item": 0.1},
    {"user": 0.2, "tags": 0.7, "item": None},
]
SHARDINGS = ["auto", "row_wise", "table_wise", "column_wise"]
CASES = [(sharding, number) for sharding in SHARDINGS for number in range(len(RATES))]


def configured(sharding: Any, rates: dict[str, float | None]) -> list[TableConfig]:
    tables = table_configs(sharding, "sgd")
    for table in tables:
        rate = rates[table.name]
        table.frozen = rate is None
        if rate is None:  # settings that would move it, and give it a state
            table.optimizer, table.learning_rate = "rowwise_adagrad", 0.3
        else:
            table.learning_rate = rate
    return tables


@dataclass
class RankRun:
    """What one rank saw."""

    after_one_step: dict[str, list[tuple[list[int], Tensor]]]  # by table: offsets and weights
    at_the_end: dict[str, list[tuple[list[int], Tensor]]]
    states: dict[str, list[str]]  # by table here: the tensors that its fused optimizer keeps


def train_all_cases(rank: int, world_size: int) -> dict[tuple[str, int], RankRun]:
    return {case: train(rank, world_size, case[0], RATES[case[1]]) for case in CASES}


def train(rank: int, world_size: int, sharding: str, rates: dict[str, float | None]) -> RankRun:
    sharded = sharded_model(configured(sharding, rates), batch_size=BATCH // world_size)
    optimizer, _ = build_dense_optimizer(sharded, [DenseGroup("all", [""], weight_decay=0.1)])
    rows, shards = rank_rows(rank, world_size), []
    for step in range(STEPS):
        logits, _ = sharded(jagged(step, rows))
        optimizer.zero_grad()
        ((logits - LABELS[step, rows]) ** 2).mean().backward()
        optimizer.step()
        shards.append(local_shards(sharded))
    states = sharded.fused_optimizer.state_dict()["state"]
    return RankRun(
        after_one_step=shards[0],
        at_the_end=shards[-1],
        states={name.split(".")[-2]: list(state) for name, state in states.items()},
    )


def first_gradients() -> dict[str, Tensor]:
    """Of the first batch's loss, from collections without fused optimizers."""
    torch.manual_seed(SEED)
    model = TablesModel(table_configs(), device="cpu")
    logits, _ = model(jagged(0, slice(0, BATCH)))
    ((logits - LABELS[0]) ** 2).mean().backward()
    holders = {**model.bags.embedding_bags, **model.sequences.embeddings}
    return {name: holder.weight.grad for name, holder in holders.items()}


@pytest.fixture(scope="module")
def runs() -> list[dict[tuple[str, int], RankRun]]:
    return run_on_ranks(train_all_cases, 2)


by_case = pytest.mark.parametrize("case", CASES, ids=[f"{name}-{number}" for name, number in CASES])


@by_case
def test_a_frozen_table_keeps_every_bit_and_has_no_state(runs: list[Any], case: Any) -> None:
    frozen = [name for name, rate in RATES[case[1]].items() if rate is None]
    for name in frozen:
        pieces = [piece for run in runs for piece in run[case].at_the_end[name]]
        assert torch.equal(whole_table(pieces), initial_tables()[name])
        for run in runs:
            assert not run[case].states.get(name)


@by_case
def test_each_table_moves_at_its_own_rate(runs: list[Any], case: Any) -> None:
    start, gradients = initial_tables(), first_gradients()
    for name, rate in RATES[case[1]].items():
        table = whole_table([piece for run in runs for piece in run[case].after_one_step[name]])
        expected = start[name] - (rate or 0.0) * gradients[name]
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)
        assert gradients[name].abs().max() > 1e-2
