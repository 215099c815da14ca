"""Plans for clusters that are not there: billions of rows in seconds, bytes as by hand."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn
from torchrec.distributed.types import ShardingPlan

from embeddings import (
    TableConfig,
    build_embedding_bag_collection,
    build_embedding_collection,
    fuse_table_optimizers,
    plan_sharding,
)
from embeddings.hardware import RESERVED_SHARE, find_hardware
from embeddings.simulated_cluster import (
    DEVICES,
    GIB,
    Cluster,
    memory_problems,
    table_bytes,
    table_memory,
)

BILLION = 10**9
CPU = replace(DEVICES["h100"], kind="cpu")
EIGHT_BY_EIGHT = Cluster(nodes=8, ranks_per_node=8, device=DEVICES["h100"])


def table(name: str = "item", rows: int = 4 * BILLION, **fields: object) -> TableConfig:
    return TableConfig(name, rows, 128, [f"{name}_id"], **fields)  # type: ignore[arg-type]


def planned(tables: list[TableConfig], cluster: Cluster) -> ShardingPlan:
    collections = [build_embedding_collection(tables), build_embedding_bag_collection(tables)]
    model = nn.ModuleList(module for module in collections if module is not None)
    fuse_table_optimizers(model, tables)
    topology = cluster.topology()
    return plan_sharding(model, tables, device=cluster.device.kind, topology=topology)


@pytest.mark.parametrize(
    ("name", "memory", "intra_node"),
    [
        ("NVIDIA A100-SXM4-80GB", 2039, 300),
        ("NVIDIA A100-SXM4-40GB", 1555, 300),
        ("NVIDIA A100-PCIE-40GB", 1935, 32),
        ("NVIDIA H100 80GB HBM3", 3350, 450),
        ("NVIDIA H100 PCIe", 2039, 64),
        ("NVIDIA H200", 4800, 450),
        ("NVIDIA GH200 480GB", 4000, 450),
        ("NVIDIA L4", 300, 32),
        ("NVIDIA H1000", None, None),
    ],
)
def test_bandwidths_are_those_of_the_card_and_of_no_other(
    name: str, memory: float | None, intra_node: float | None
) -> None:
    hardware = find_hardware(name)
    assert (hardware.memory, hardware.intra_node) == (memory, intra_node)
    assert hardware.is_unknown == (memory is None)


def test_the_planner_gets_the_bandwidths_of_the_device() -> None:
    topology = EIGHT_BY_EIGHT.topology()
    assert topology.hbm_mem_bw == 3350e9 / 1000  # bytes a millisecond
    assert topology.hbm_to_ddr_mem_bw == 64e9 / 1000


def test_a_table_in_host_memory_takes_the_bytes_of_its_cache_on_the_device() -> None:
    cached = table(pooling="none", kernel="uvm_caching", cache_load_factor=0.1)
    memory = table_memory(cached, planned([cached], EIGHT_BY_EIGHT))

    assert memory.kernel == "fused_uvm_caching"
    rows = 62_500_000  # of a rank
    # A tenth of the weights; for each row of the table 4 bytes, for each of the cache 16.
    assert memory.bytes_on_device(0) == rows * 128 * 4 // 10 + 4 * rows + 16 * rows // 10
    assert memory.bytes_on_host(0) == rows * (128 * 4 + 4)
    uncached = table(pooling="none", kernel="uvm")
    assert table_memory(uncached, planned([uncached], EIGHT_BY_EIGHT)).bytes_on_device(0) == 0


@pytest.mark.parametrize("kernel", ["uvm", "uvm_caching"])
def test_host_memory_beside_a_gpu_is_refused_on_cpu(kernel: str) -> None:
    with pytest.raises(ValueError, match=rf"'item': kernel '{kernel}' needs CUDA.*'fused'"):
        planned([table(rows=10, kernel=kernel)], replace(EIGHT_BY_EIGHT, device=CPU))


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_row"),
    [("rowwise_adagrad", 4), ("adagrad", 512), ("adam", 1024), ("sgd", 0)],
)
def test_optimizer_state(optimizer: str, bytes_per_row: int) -> None:
    assert table_bytes(table(rows=10, optimizer=optimizer)) == 10 * (512 + bytes_per_row)
    assert table_bytes(table(rows=10, optimizer=optimizer, frozen=True)) == 10 * 512


@pytest.mark.parametrize("kernel", ["fused", "uvm"])
def test_rows_of_half_precision_take_half_the_memory_and_their_state_as_much(kernel: str) -> None:
    full = table(rows=6 * BILLION, kernel=kernel, sharding="row_wise")
    half = replace(full, precision="fp16")
    reports = [table_memory(t, planned([t], EIGHT_BY_EIGHT)) for t in (full, half)]
    (weights, state), (half_weights, half_state) = (t.bytes_on_rank(0) for t in reports)
    assert (half_weights, half_state) == (weights / 2, state)
    on_device = 0 if kernel == "uvm" else half_weights + half_state
    assert reports[1].bytes_on_device(0) == on_device
    assert half.megabytes == full.megabytes / 2
    # The planner counts as we do: a table that fits in half precision alone is refused in whole.
    large = replace(full, num_embeddings=10 * BILLION)
    if kernel == "fused":
        planned([replace(large, precision="fp16")], EIGHT_BY_EIGHT)
        with pytest.raises(ValueError, match="do not fit"):
            planned([large], EIGHT_BY_EIGHT)


def test_column_shards_keep_moments_of_their_own() -> None:
    item = table(rows=1000, sharding="column_wise", pooling="none")
    memory = table_memory(item, planned([item], EIGHT_BY_EIGHT))

    assert len(memory.shards) == 32
    assert sum(memory.bytes_on_rank(rank)[1] for rank in range(64)) == 32 * 1000 * 4


def test_what_does_not_fit_is_refused_by_the_planner_too() -> None:
    tables = [table(rows=20 * BILLION, pooling="none"), table("user", 1000)]
    with pytest.raises(ValueError, match="'item'"):
        planned(tables, EIGHT_BY_EIGHT)
    lines = memory_problems(tables, EIGHT_BY_EIGHT.device.memory_bytes, 64)

    room = int(79 * GIB * (1 - RESERVED_SHARE))
    size = 20 * BILLION * (512 + 4)
    assert lines[0] == (
        f"table 'item' ({20 * BILLION:,} x 128, rowwise_adagrad, auto) takes {size:,} bytes; 64 "
        f"ranks can hold {64 * room:,}"
    )
    ranks = -(-(size + table_bytes(tables[1])) // room)
    assert any(line.endswith(f": {ranks:,} ranks") for line in lines)


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"sharding": "table_wise"}, "sharding 'row_wise'"),
        ({"optimizer": "adam"}, "optimizer 'rowwise_adagrad'"),
        ({"num_embeddings": 20 * BILLION}, "kernel 'uvm_caching'"),
        ({"num_embeddings": 10 * BILLION}, "precision 'fp16'"),
    ],
)
def test_a_fix_that_is_named_is_enough(change: dict[str, Any], fix: str) -> None:
    too_large = replace(table(rows=6 * BILLION), **change)
    bytes_per_rank, host_bytes = 79 * GIB, EIGHT_BY_EIGHT.device.host_memory_bytes
    lines = memory_problems([too_large], bytes_per_rank, 64, host_bytes)

    assert f"enough would be: {fix} for table 'item'" in lines
    setting, value = fix.split(" ")
    changed = replace(too_large, **{setting: value.strip("'")})
    assert not memory_problems([changed], bytes_per_rank, 64, host_bytes)
    too_little = memory_problems([too_large], bytes_per_rank, 64, host_bytes // 100)
    assert not any("kernel" in line for line in too_little)


def test_dimension_and_rows_that_would_fit_are_the_largest_that_do() -> None:
    lines = memory_problems([table(rows=20 * BILLION)], 79 * GIB, 64)
    dim = next(int(line.split()[4]) for line in lines if "embedding_dim" in line)
    rows = next(int(line.split()[4].replace(",", "")) for line in lines if "num_emb" in line)

    fitting = replace(table(rows=20 * BILLION), embedding_dim=dim)
    assert not memory_problems([fitting], 79 * GIB, 64)
    assert memory_problems([replace(fitting, embedding_dim=dim + 4)], 79 * GIB, 64)
    assert not memory_problems([table(rows=rows)], 79 * GIB, 64)
    assert memory_problems([table(rows=rows + 1_000_000)], 79 * GIB, 64)
