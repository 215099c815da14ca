"""Vectors and gradients that travel in 16 bits are those of fp32 but for one rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings import sharders
from tests.embeddings.tables_model import (
    FEATURES,
    LABELS,
    jagged,
    local_shards,
    rank_rows,
    sharded_model,
    table_configs,
    whole_table,
)
from tests.ranks import run_on_ranks

SHARDINGS = ("row_wise", "table_wise", "column_wise")
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-9}  # largest relative error of one rounding
RATE = 0.1
TYPES = [("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp16"), ("fp32", "bf16")]
CASES = [(sharding, *types) for sharding in SHARDINGS for types in TYPES]

by_type = pytest.mark.parametrize("type_name", list(ROUNDING))
by_sharding = pytest.mark.parametrize("sharding", SHARDINGS)


def one_step(rank: int, world_size: int) -> dict[Any, dict[str, Any]]:
    return {case: _one_step(rank, world_size, *case) for case in CASES}


def _one_step(
    rank: int, world_size: int, sharding: Any, forward: Any, backward: Any
) -> dict[str, Any]:
    tables, rows = table_configs(sharding, "sgd", RATE), rank_rows(rank, world_size)
    sharded = sharded_model(tables, communication=(forward, backward))
    before = local_shards(sharded)
    logits, vectors = sharded(jagged(0, rows))
    ((logits - LABELS[0, rows]) ** 2).mean().backward()
    return {
        "vectors": {name: value.detach().clone() for name, value in vectors.items()},
        "before": before,
        "after": local_shards(sharded),
    }


@pytest.fixture(scope="module")
def two_ranks() -> Any:
    return run_on_ranks(one_step, 2)


def gradient_of(runs: Any, case: Any, table: str) -> Tensor:
    """What plain SGD moved the table by, over its learning rate."""
    before, after = (
        whole_table([piece for run in runs for piece in run[case][when][table]])
        for when in ("before", "after")
    )
    return (before - after) / RATE


@by_type
@by_sharding
def test_all_vectors_agree_with_fp32_to_the_rounding_of_their_type(
    two_ranks: Any, sharding: str, type_name: str
) -> None:
    for run in two_ranks:
        for feature in FEATURES:
            exact = run[sharding, "fp32", "fp32"]["vectors"][feature]
            rounded = run[sharding, type_name, "fp32"]["vectors"][feature]
            # Parts may be larger than their sum; each of up to three is rounded, and the sum.
            atol = 4 * ROUNDING[type_name] * float(exact.abs().max())
            torch.testing.assert_close(rounded, exact, rtol=0, atol=atol)
            assert not torch.equal(rounded, exact)
            # Gradients that are rounded leave the vectors exact.
            assert torch.equal(run[sharding, "fp32", type_name]["vectors"][feature], exact)


@by_type
@by_sharding
@pytest.mark.parametrize("table", ["user", "tags", "item"])
def test_updates_of_tables_agree_with_fp32_to_the_rounding_of_gradients(
    two_ranks: Any, sharding: str, table: str, type_name: str
) -> None:
    exact = gradient_of(two_ranks, (sharding, "fp32", "fp32"), table)
    rounded = gradient_of(two_ranks, (sharding, "fp32", type_name), table)
    assert exact.abs().max() > 1e-2
    # A row's gradient is the sum of at most four rounded ones.
    atol = 4 * ROUNDING[type_name] * float(exact.abs().max())
    torch.testing.assert_close(rounded, exact, rtol=0, atol=atol)
    # Weights of 0.1 keep differences of gradients down to 1e-7.
    assert (rounded - exact).abs().max() > 1e-5


def test_an_unknown_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"forward is 'int8'.*\['fp32', 'fp16'"):
        sharders("int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backward is 'fp8'"):
        sharders("fp16", "fp8")  # type: ignore[arg-type]
