"""What fused optimizers remember, saved and loaded across plans that cut columns differently."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from embeddings import (
    TableConfig,
    build_embedding_collection,
    fuse_table_optimizers,
    plan_sharding,
    sharders,
)
from embeddings import table_state as table_state_module
from embeddings.table_state import (
    TableOptimizerState,
    in_blocks,
    table_weights,
)
from embeddings.torchrec_internals import table_kernels
from tests.ranks import run_on_ranks

ROWS, DIM = 7, 16
NAME = "0.embeddings.item.weight.momentum1"


def build(plan: Any, optimizer: Any = "rowwise_adagrad") -> DistributedModelParallel:
    table = TableConfig("item", ROWS, DIM, ["item"], sharding=plan, optimizer=optimizer)
    model = nn.Sequential(build_embedding_collection([table]))  # type: ignore[arg-type]
    fuse_table_optimizers(model, [table])
    env = ShardingEnv.from_process_group(dist.group.WORLD)  # type: ignore[arg-type]
    return DistributedModelParallel(
        model, env, torch.device("cpu"), plan_sharding(model, [table]), sharders()
    )


def moments(model: DistributedModelParallel) -> dict[tuple[int, int], Tensor]:
    """This rank's moments by (first row, first column) of the shard of weights."""
    (weight,) = table_weights(model).values()
    states = model.fused_optimizer.state_dict()["state"].values()
    shards = [
        local for values in states for value in values.values() for local in value.local_shards()
    ]
    return {
        (shard.metadata.shard_offsets[0], shard.metadata.shard_offsets[1]): local.tensor
        for shard, local in zip(weight.local_shards(), shards, strict=True)
    }


def save_column_wise(rank: int, world_size: int, folder: Path) -> None:
    model = build("column_wise")
    for (_, column), moment in moments(model).items():
        moment.copy_(torch.arange(ROWS) + 100.0 * column)
    state = TableOptimizerState(model, dist.group.WORLD).state_dict()  # type: ignore[arg-type]
    assert list(state) == [f"{NAME}.columns_0_8", f"{NAME}.columns_8_16"]
    dcp.save(state, checkpoint_id=folder / "columns")


def load(rank: int, world_size: int, folder: Path, plan: str) -> dict[tuple[int, int], Tensor]:
    model = build(plan)
    training = TableOptimizerState(model, dist.group.WORLD)  # type: ignore[arg-type]
    stored = list(dcp.FileSystemReader(folder / "columns").read_metadata().state_dict_metadata)
    state = training.state_dict(stored)
    dcp.load(state, checkpoint_id=folder / "columns")
    training.finish_loading()
    return {offsets: moment.clone() for offsets, moment in moments(model).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table_state")
    run_on_ranks(save_column_wise, 2, folder)
    return folder


@pytest.mark.parametrize("plan", ["row_wise", "table_wise"])
def test_a_whole_rows_moment_is_the_mean_of_its_column_shards(folder: Path, plan: str) -> None:
    """mean over all columns of g^2 = mean over the shards of their means, summed over steps."""
    shards: dict[tuple[int, int], Tensor] = {}
    for rank in run_on_ranks(load, 2, folder, plan):
        shards |= rank
    full = torch.cat([shards[offsets] for offsets in sorted(shards)])
    torch.testing.assert_close(full, torch.arange(ROWS) + 400.0)


def test_the_same_column_shards_get_their_own_moments_back(folder: Path) -> None:
    ranks = run_on_ranks(load, 2, folder, "column_wise")
    for column, rank in ((0, ranks[0]), (8, ranks[1])):
        torch.testing.assert_close(rank[0, column], torch.arange(ROWS) + 100.0 * column)


def test_other_column_shards_get_the_mean_of_what_they_share(folder: Path) -> None:
    """Columns [0, 8) were at 0 and [8, 16) at 800; on 4 ranks a shard has 4 columns."""
    actual: dict[tuple[int, int], Tensor] = {}
    for rank in run_on_ranks(load, 4, folder, "column_wise"):
        actual |= rank
    for column, expected in ((0, 0.0), (4, 0.0), (8, 800.0), (12, 800.0)):
        torch.testing.assert_close(actual[0, column], torch.arange(ROWS) + expected)


def steps_of_kernels(rank: int, world_size: int) -> list[int]:
    model = build("row_wise")
    model.fused_optimizer.set_optimizer_step(7)
    return [int(kernel.iter) for kernel in table_kernels(model)]


def test_fused_optimizers_are_told_the_number_of_steps() -> None:
    """Adam corrects its moments by it; the state of the optimizer leaves it out."""
    assert run_on_ranks(steps_of_kernels, 2) == [[7], [7]]


def blocks(rank: int, world_size: int) -> list[tuple[list[int], list[int]]]:
    table_state_module.BLOCK_BYTES = 2 * DIM * 4
    (weight,) = table_weights(build("row_wise")).values()
    cut = in_blocks(weight)
    for shard in cut.local_shards():
        first = shard.metadata.shard_offsets[0] - weight.local_shards()[0].metadata.shard_offsets[0]
        columns = weight.local_shards()[0].tensor[first:]
        assert shard.tensor.data_ptr() == columns.data_ptr()
        # torch's writer copies parts of larger storages.
        assert shard.tensor.untyped_storage().nbytes() == shard.tensor.nbytes
    return [(block.shard_offsets, block.shard_sizes) for block in cut.metadata().shards_metadata]


def test_shards_are_cut_into_blocks_that_share_their_memory() -> None:
    for rank in run_on_ranks(blocks, 2):
        assert rank == [
            ([0, 0], [2, DIM]),
            ([2, 0], [2, DIM]),
            ([4, 0], [2, DIM]),
            ([6, 0], [1, DIM]),
        ]
