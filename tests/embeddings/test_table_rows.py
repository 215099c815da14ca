"""Rows of a table on two ranks, under every plan: what is read, averaged and written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.table_rows import TableRows
from tests.embeddings.tables_model import (
    DIM,
    initial_tables,
    jagged,
    local_shards,
    table_configs,
    whole_table,
)
from tests.embeddings.test_row_reset import with_optimizer
from tests.ranks import run_on_ranks

SHARDINGS = ["row_wise", "table_wise", "column_wise"]
ROWS = torch.tensor([6, 0, 5])


def rows_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    result = {}
    for sharding in SHARDINGS:
        model, combined = with_optimizer(table_configs(sharding, "rowwise_adagrad"))
        untrained = TableRows(model, "item", group).mean()
        loss = model(jagged(1, slice(rank, 4, world_size)))[0].square().mean()
        combined.zero_grad()
        loss.backward()
        combined.step()
        rows = TableRows(model, "item", group)
        before, read, mean = local_shards(model)["item"], rows.read(ROWS), rows.mean()
        rows.fill_untrained(torch.arange(DIM))
        rows.write(torch.tensor([1, 6]), torch.full((2, DIM), 7.0))
        after, is_trained = (
            local_shards(model)["item"],
            TableRows(model, "item", group).read(ROWS)[1],
        )
        trained = TableRows(
            model, "item", group, lambda start, stop: torch.arange(start, stop).numpy() < 2
        )
        result[sharding] = untrained, before, read, mean, after, is_trained, trained.read(ROWS)[1]
    return result


@pytest.fixture(scope="module")
def result() -> list[dict[str, Any]]:
    return run_on_ranks(rows_on_rank, 2)


def of_plan(values: list[dict[str, Any]], sharding: str, part: int) -> Tensor:
    return whole_table([piece for rank in values for piece in rank[sharding][part]])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_rows_are_read_averaged_and_written(result: list[dict[str, Any]], sharding: str) -> None:
    before, after = of_plan(result, sharding, 1), of_plan(result, sharding, 4)
    changed = (before != initial_tables()["item"]).any(dim=1).nonzero().flatten().tolist()
    for rank in result:
        untrained, _, (values, is_trained), (mean, count), _, still, trained = rank[sharding]
        assert untrained[1] == 0
        assert torch.equal(values, before[ROWS])
        assert is_trained.tolist() == [row in changed for row in ROWS.tolist()]
        assert is_trained.tolist() == still.tolist()  # values alone do not train a row
        assert trained.tolist() == [False, True, False]
        assert count == len(changed)
        torch.testing.assert_close(mean, before[changed].double().mean(dim=0))
    expected = before.clone()
    expected[[row for row in range(7) if row not in changed]] = torch.arange(DIM).float()
    expected[[1, 6]] = 7.0
    assert torch.equal(after, expected)
