"""On two ranks: a DLRM's checkpoint goes into the DLRM with content, trains, and comes back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer

from recsys.plug_in import (
    DLRMWithContent,
    DLRMWithContentTrain,
    add_content,
    dlrm_state,
)
from recsys.training.trainer import require_pipelined
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.plug_in.plug_in_runs import (
    KINDS,
    NUM_ITEMS,
    build_dlrm,
    plug_in_settings,
    shard,
    user_batches,
)

CPU = torch.device("cpu")
README = (Path(__file__).parents[3] / "recsys" / "plug_in" / "README.md").read_text()
(LOADING,) = re.findall(r"^```py\n(.*?load_dlrm.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def users_job(kind: str) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The DLRM without content, as its own script builds it."""
    torch.manual_seed(0)
    return shard(DLRMTrain(build_dlrm(kind)), dist.get_world_size())


def content_job(
    kind: str, folder: Path, **changed: Any
) -> tuple[DLRMWithContentTrain, DistributedModelParallel, Any]:
    """The same script with content."""
    torch.manual_seed(0)
    settings = plug_in_settings(folder, **changed)
    train_model: Any = add_content(DLRMTrain(build_dlrm(kind)), settings, CPU)
    model, optimizer = shard(train_model, dist.get_world_size())
    return train_model, model, train_model.optimizer(optimizer)


def train(pipeline: Any, batches: Any) -> list[Tensor]:
    """The losses of one pass."""
    losses, iterator = [], iter(batches)
    while True:
        try:
            losses.append(pipeline.progress(iterator)[0])
        except StopIteration:
            return losses


def logits_of(model: DistributedModelParallel, batches: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(batch)[1][1] for batch in batches])
    model.train()
    return logits


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a state, those of this rank where they are sharded."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            result[name] = copied(value)
        elif isinstance(value, ShardedTensor):
            result[name] = [shard.tensor.clone() for shard in value.local_shards()]
        else:
            result[name] = value.detach().clone()
    return result


def users_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """What the user's script gives torch.distributed.checkpoint."""
    return {"model": model.state_dict(), "optimizer": {"state": optimizer.state_dict()["state"]}}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Names of tensors that are not equal to the bit, or only on one side."""
    if isinstance(first, dict):
        alone = [f"{path}.{name}" for name in first.keys() ^ second.keys()]
        inner = [
            differences(first[n], second[n], f"{path}.{n}") for n in first.keys() & second.keys()
        ]
        return alone + [name for names in inner for name in names]
    if isinstance(first, list):
        is_equal = len(first) == len(second) and all(map(torch.equal, first, second))
    else:
        is_equal = torch.equal(first, second)
    return [] if is_equal else [path]


def write_checkpoints(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """The user's script: trains, saves, and says which logits it has."""
    results = {}
    for kind in KINDS:
        model, optimizer = users_job(kind)
        losses = train(TrainPipelineBase(model, optimizer, CPU), user_batches(rank, 3))
        dcp.save(users_state(model, optimizer), checkpoint_id=folder / kind)
        logits = logits_of(model, user_batches(rank, 3))
        results[kind] = {"losses": losses, "logits": logits}
    return results


def plug_content_in(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """The same with content, from the checkpoint: first logits, and the DLRM taken out again."""
    results = {}
    for kind in KINDS:
        dlrm, model, optimizer = content_job(kind, folder)
        names = {"model": model, "optimizer": optimizer}
        users, _ = (optimizer_part for _, optimizer_part in optimizer.optimizers)
        names["dense_optimizer"] = users.optimizers[-1][1]
        exec(LOADING.replace("dlrm_checkpoint", str(folder / kind)), names)
        results[kind] = {"logits": logits_of(model, dlrm.batches(user_batches(rank, 3)))}
        results[kind]["bank"] = dlrm.model.content.branch.bank.coverage()
        results[kind] |= train_and_take_out(
            rank, folder / f"{kind}-trained", dlrm, model, optimizer
        )
    return results


def train_and_take_out(
    rank: int, folder: Path, dlrm: DLRMWithContentTrain, model: Any, optimizer: Any
) -> dict[str, Any]:
    old_state = copied(model.state_dict())
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    losses = train(pipeline, dlrm.batches(user_batches(rank, 3)))
    require_pipelined(model)
    pipeline.detach()  # else nothing but the pipeline may call the model
    new_state = model.state_dict()
    dcp.save(dlrm_state(model, optimizer), checkpoint_id=folder)
    with torch.no_grad():
        plain = [dlrm_logits(dlrm.model, batch) for batch in user_batches(rank, 3)]
    return {
        "losses": losses,
        "moved": differences(old_state, copied(new_state)),
        "plain": torch.cat(plain),
        "trained": copied(dlrm_state(model, optimizer)),
    }


def dlrm_logits(dlrm: DLRMWithContent, batch: Batch) -> Tensor:
    """Those of the DLRM inside, by its own parts alone."""
    dense, sparse = dlrm.dense_arch(batch.dense_features), dlrm.sparse_arch(batch.sparse_features)
    return dlrm.over_arch(dlrm.inter_arch(dense, sparse)).squeeze(-1)


def take_back(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """The user's script again, from what was taken out of the model with content."""
    results = {}
    for kind in KINDS:
        model, optimizer = users_job(kind)
        optimizer.optimizers[-1][1].init_state()
        state = users_state(model, optimizer)
        dcp.load(state, checkpoint_id=folder / f"{kind}-trained")
        optimizer.load_state_dict(state["optimizer"])
        logits = logits_of(model, user_batches(rank, 3))
        results[kind] = {"logits": logits, "state": copied(users_state(model, optimizer))}
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("plug_in")
    write_dataset(folder / "data", num_items=NUM_ITEMS)
    return {
        "user": run_on_ranks(write_checkpoints, 2, folder),
        "content": run_on_ranks(plug_content_in, 2, folder),
        "back": run_on_ranks(take_back, 2, folder),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_old_checkpoint_the_first_logits_are_equal(runs: Any, kind: str) -> None:
    for user, content in zip(runs["user"], runs["content"]):
        assert len(set(user[kind]["logits"].tolist())) > 1
        assert (user[kind]["logits"] - content[kind]["logits"]).abs().max() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_content_trains_in_the_users_pipeline_from_a_filled_bank(runs: Any, kind: str) -> None:
    for content in runs["content"]:
        assert content[kind]["bank"] == 1.0
        moved = {name.split(".")[2] for name in content[kind]["moved"]}
        assert moved >= {"sparse_arch", "dense_arch", "over_arch", "content", "content_head"}
        losses = content[kind]["losses"]
        assert len(losses) == 3 and len({float(loss) for loss in losses}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_dlrm_goes_back_into_the_users_script(runs: Any, kind: str) -> None:
    for content, back in zip(runs["content"], runs["back"]):
        assert differences(content[kind]["trained"], back[kind]["state"]) == []
        assert torch.equal(content[kind]["plain"], back[kind]["logits"])
