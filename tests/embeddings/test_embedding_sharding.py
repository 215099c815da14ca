"""Plans of tables, and the types in which ranks exchange their vectors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from embeddings import (
    TableConfig,
    build_embedding_bag_collection,
    build_embedding_collection,
    fuse_table_optimizers,
    plan_sharding,
    sharders,
)
from embeddings.sharding import machine_topology
from tests.embeddings.tables_model import (
    FEATURES,
    LABELS,
    full_table,
    jagged,
    local_shards,
    rank_rows,
    sharded_model,
    table_configs,
)
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


class Collections(nn.Module):
    """A model that is nothing but its collections."""

    def __init__(self, tables: list[TableConfig]) -> None:
        super().__init__()
        self.bags = build_embedding_bag_collection(tables)
        self.sequences = build_embedding_collection(tables)


def table(name: str, rows: int = 100, **changes: Any) -> TableConfig:
    settings: dict[str, Any] = {"embedding_dim": 16, "features": [name], **changes}
    return TableConfig(name=name, num_embeddings=rows, **settings)


def plan(
    tables: list[TableConfig], topology: Topology | None = None, **options: Any
) -> ShardingPlan:
    model = Collections(tables)
    fuse_table_optimizers(model, tables)
    return plan_sharding(model, tables, topology=topology, **options)


def sharding_of(sharding_plan: ShardingPlan) -> dict[str, ParameterSharding]:
    result: dict[str, ParameterSharding] = {}
    for module_plan in sharding_plan.plan.values():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        result.update(module_plan)
    return result


def shards(sharding: ParameterSharding) -> list[Any]:
    spec: Any = sharding.sharding_spec
    return list(spec.shards)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_no_table_is_ever_data_parallel_however_small(world_size: int) -> None:
    tables = [table("tiny_bag", rows=3, pooling="sum"), table("tiny_sequence", rows=3)]
    planned = sharding_of(plan(tables, machine_topology(world_size, world_size, CPU)))
    assert planned.keys() == {"tiny_bag", "tiny_sequence"}
    for sharding in planned.values():
        assert sharding.sharding_type != "data_parallel"
        assert sharding.compute_kernel == "fused"


def test_one_rank_holds_whole_tables_unless_told_otherwise() -> None:
    tables = [table("bag", rows=10**5, pooling="sum"), table("sequence", rows=10**5)]
    one_rank = machine_topology(1, 1, CPU)
    planned = sharding_of(plan(tables, one_rank))
    assert {sharding.sharding_type for sharding in planned.values()} == {"table_wise"}
    tables[0].sharding = "row_wise"
    assert sharding_of(plan(tables, one_rank))["bag"].sharding_type == "row_wise"


@pytest.mark.parametrize(
    ("dim", "world_size", "widths"),
    [(16, 4, [4] * 4), (24, 4, [8] * 3), (64, 8, [8] * 8), (4, 2, [4]), (20, 2, [20])],
)
def test_column_shards_are_as_many_as_ranks_where_kernels_allow(
    dim: int, world_size: int, widths: list[int]
) -> None:
    for pooling in ("sum", "none"):
        tables = [table("wide", sharding="column_wise", pooling=pooling, embedding_dim=dim)]
        column = shards(sharding_of(plan(tables, machine_topology(world_size, 1, CPU)))["wide"])
        assert [shard.shard_sizes[1] for shard in column] == widths
        assert len({shard.placement.rank() for shard in column}) == len(widths)


def plan_errors(rank: int, world_size: int) -> list[str]:
    errors = []
    for size, rows in [(world_size, 10**7), (world_size + 1, 100)]:
        topology = machine_topology(size, size, CPU, host_memory_bytes=10 * 2**20)
        with pytest.raises(ValueError) as error:
            plan([table("huge", rows=rows)], topology)
        errors.append(str(error.value))
    return errors


def test_a_planning_error_ends_every_rank_with_the_same_words() -> None:
    first, second = run_on_ranks(plan_errors, 2)
    assert first == second
    assert "'huge' 610.4 MB" in first[0]
    assert "topology has 3 ranks" in first[1]


def test_a_table_without_fused_optimizer_is_refused() -> None:
    tables = [table("item")]
    with pytest.raises(ValueError, match="fuse_table_optimizers"):
        plan_sharding(Collections(tables), tables)


def test_a_table_that_is_configured_but_not_in_the_model_is_refused() -> None:
    tables = [table("item")]
    model = Collections(tables)
    fuse_table_optimizers(model, tables)
    with pytest.raises(ValueError, match=r"table 'user'.* configuration"):
        plan_sharding(model, [*tables, table("user")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "optimizer 'adam' needs CUDA"),
        ({"weight_decay": 0.1}, "weight_decay 0.1 needs CUDA"),
    ],
)
def test_what_the_kernels_of_a_cpu_cannot_do_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan([table("item", **changes)])


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
    old_shards = local_shards(sharded)
    logits, vectors = sharded(jagged(0, rows))
    ((logits - LABELS[0, rows]) ** 2).mean().backward()
    return {
        "vectors": {name: value.detach().clone() for name, value in vectors.items()},
        "before": old_shards,
        "after": local_shards(sharded),
    }


@pytest.fixture(scope="module")
def two_ranks() -> Any:
    return run_on_ranks(one_step, 2)


def gradient_of(runs: Any, case: Any, table: str) -> Tensor:
    """What plain SGD moved the table by, over its learning rate."""
    old, new = (
        full_table([shard for run in runs for shard in run[case][moment][table]])
        for moment in ("before", "after")
    )
    return (old - new) / RATE


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
