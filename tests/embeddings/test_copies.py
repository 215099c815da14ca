"""Two copies of the tables, each on two of four ranks, train as one table does.

TorchRec asserts that the devices are GPUs, and takes means by an operation that gloo lacks. On CPU
the test therefore removes the assertion and brings a mean of its own; all else is the same code.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.remote_device import _remote_device
from torchrec.distributed import model_parallel
from torchrec.distributed.model_parallel import DMPCollection

from embeddings import fuse_table_optimizers, plan_sharding, sharders
from embeddings.sharding import CopiesMean
from embeddings.table_state import TableOptimizerState, in_blocks, table_weights
from recsys.optimizer import DenseGroup, build_dense_optimizer
from tests.embeddings.tables_model import (
    BATCH,
    LABELS,
    SEED,
    STEPS,
    TablesModel,
    full_table,
    jagged,
    local_shards,
    table_configs,
    train_in_plain_pytorch,
)
from tests.ranks import rank_device, run_on_ranks

COPIES, RANKS = 2, 4
CASES = [
    *((sharding, "sgd") for sharding in ("row_wise", "table_wise", "column_wise")),
    ("row_wise", "rowwise_adagrad"),
]

pytestmark = pytest.mark.long


def without_assertions() -> Any:
    """TorchRec's module as `python -O` would compile it."""
    module, file = ModuleType("without_assertions"), model_parallel.__file__
    exec(compile(Path(file).read_text(), file, "exec", optimize=1), vars(module))
    # A shard on a CPU is on "cpu", not on "cpu:0".
    vars(module)["_remote_device"] = lambda name: _remote_device(name.partition("/")[0] + "/cpu")
    return module


def distributed(model: TablesModel, plan: Any, device: torch.device) -> DMPCollection:
    group = dist.group.WORLD
    assert group is not None
    kind = without_assertions().DMPCollection if device.type == "cpu" else DMPCollection
    sizes = {"world_size": RANKS, "sharding_group_size": RANKS // COPIES}
    result: DMPCollection = kind(model, device, plan, **sizes, global_pg=group, sharders=sharders())
    if device.type == "cpu":
        result.set_all_reduce_hook(lambda tensors: mean_over(result, tensors))
    return result


def mean_over(model: DMPCollection, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor, group=model._default_ctx.replica_pg)
        tensor /= COPIES


def train_all_cases(rank: int, world_size: int, folder: Path) -> dict[Any, dict[str, Any]]:
    return {case: train(rank, folder / "-".join(case), *case) for case in CASES}


def train(rank: int, folder: Path, sharding: Any, optimizer: Any) -> dict[str, Any]:
    torch.manual_seed(SEED)
    device = rank_device()
    tables = table_configs(sharding, optimizer)
    model = TablesModel(tables)
    fuse_table_optimizers(model, tables)
    plan = plan_sharding(model, tables, device=device, batch_size=1, copies=COPIES)
    sharded = distributed(model, plan, device)
    combined, _ = build_dense_optimizer(sharded, [DenseGroup("all", [""], learning_rate=0.01)])
    mean, rows = CopiesMean(sharded, interval=1), slice(rank, rank + 1)
    labels, logits = LABELS[:, rows].to(device), []
    for step in range(STEPS):
        output, _ = sharded(jagged(step, rows, device))
        logits.append(output.detach().clone())
        combined.zero_grad()
        ((output - labels[step]) ** 2).mean().backward()
        combined.step()
        mean.step()
    save_and_restore(sharded, folder)
    return {"logits": torch.stack(logits), "pieces": local_shards(sharded)}


def save_and_restore(model: DMPCollection, folder: Path) -> None:
    """Stores tables and moments once, not once per copy, and reads both copies from there."""
    group, old_shards = dist.group.WORLD, local_shards(model)
    assert group is not None
    moments = TableOptimizerState(model, group)
    state = {name: in_blocks(value, group) for name, value in table_weights(model).items()}
    state |= {f"moments.{name}": value for name, value in moments.state_dict().items()}
    dcp.save(state, checkpoint_id=folder)
    with torch.no_grad():
        for block in (block for value in state.values() for block in value.local_shards()):
            block.tensor.zero_()
    assert not any(tensor.any() for shards in local_shards(model).values() for _, tensor in shards)
    dcp.load(state, checkpoint_id=folder)
    for name, shards in local_shards(model).items():
        for (_, result), (_, expected) in zip(shards, old_shards[name], strict=True):
            assert torch.equal(result, expected)


@pytest.fixture(scope="module")
def runs(device: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("copies")
    return folder, run_on_ranks(train_all_cases, RANKS, folder, device=device)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_copies_under_sgd_train_as_one_table(device: str, runs: Any, sharding: str) -> None:
    ranks = [run[sharding, "sgd"] for run in runs[1]]
    plain = train_in_plain_pytorch("sgd", 1, device=device)
    logits = torch.cat([rank["logits"] for rank in ranks], dim=1)
    torch.testing.assert_close(logits, plain.logits, rtol=0, atol=1e-5)
    assert BATCH == RANKS
    for copy in range(COPIES):
        for name in ("user", "tags", "item"):
            copy_losses = [shard for rank in ranks[copy::COPIES] for shard in rank["pieces"][name]]
            torch.testing.assert_close(
                full_table(copy_losses), plain.weights[name], rtol=0, atol=1e-5
            )


def test_copies_keep_equal_weights_and_store_their_moments(runs: Any) -> None:
    folder, rank_losses = runs
    first, second, *_ = [run["row_wise", "rowwise_adagrad"] for run in rank_losses]
    for name, shards in first["pieces"].items():
        for (offsets, mine), (other_runs, theirs) in zip(
            shards, second["pieces"][name], strict=True
        ):
            assert offsets == other_runs and torch.equal(mine, theirs)
    reader = dcp.FileSystemReader(folder / "row_wise-rowwise_adagrad")
    names = reader.read_metadata().state_dict_metadata
    assert len([name for name in names if name.startswith("moments.")]) == 3
