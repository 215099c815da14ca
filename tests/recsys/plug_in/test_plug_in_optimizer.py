"""The AdamW of the new parameters beside the user's, and content in a model of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.models.dlrm import DLRMTrain

from recsys.plug_in import ContentRates, add_content, build_item_content
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.plug_in.plug_in_runs import (
    BATCH,
    NUM_ITEMS,
    build_dlrm,
    plug_in_settings,
    shard,
    user_batches,
)

CPU = torch.device("cpu")
STEEP = 15.0  # the default rate of SGD in TorchRec's dlrm_main.py
STEPS = 8


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=STEEP)


def steep_run(rank: int, world_size: int, folder: Path, rates: ContentRates | None) -> Any:
    """Losses under steep SGD; how far the first step moved each tensor; names with state."""
    torch.manual_seed(0)
    settings = plug_in_settings(folder, optimizer=rates)
    train_model: Any = add_content(DLRMTrain(build_dlrm("dlrm")), settings, CPU)
    model, yours = shard(train_model, world_size, sgd)
    if rates is not None:
        with pytest.raises(ValueError, match=r"train_model\.optimizer"):
            iter(train_model.batches(user_batches(rank, 1)))
    optimizer = train_model.optimizer(yours)
    pipeline: Any = TrainPipelineBase(model, optimizer, CPU)
    old_weights = {name: value.detach().clone() for name, value in train_model.named_parameters()}
    batches, losses = iter(train_model.batches(user_batches(rank, STEPS))), []
    moves: dict[str, float] = {}
    for _ in range(STEPS):
        losses.append(float(pipeline.progress(batches)[0]))
        moves = moves or {
            name: float((value - old_weights[name]).abs().max())
            for name, value in train_model.named_parameters()
            if value.numel()
        }
    return losses, moves, list(optimizer.state_dict()["state"])


def plugged_in(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    results = {str(r): steep_run(rank, world_size, folder, r) for r in (ContentRates(), None)}
    items: Any = build_item_content(plug_in_settings(folder), NUM_ITEMS, CPU)
    results["two tower"] = two_tower_gradients(items, rank)
    try:
        add_content(nn.Linear(1, 1), plug_in_settings(folder), CPU)  # type: ignore[call-overload]
    except ValueError as error:
        results["refused"] = str(error)
    return results


def two_tower_gradients(items: Any, rank: int) -> tuple[torch.Size, float]:
    """Size of the content vectors in a two-tower model, and the gradient of the projections."""
    users = nn.EmbeddingBag(NUM_ITEMS, 16)
    (batch,) = items.batches(user_batches(rank, 1))
    vectors: Tensor = items.branch(batch).target
    query = users(
        batch.sparse_features["user"].values(), batch.sparse_features["user"].offsets()[:-1]
    )
    (query * vectors).sum().backward()
    gradients = [p.grad for p in items.branch.projections.parameters() if p.grad is not None]
    return vectors.shape, float(sum(g.abs().sum() for g in gradients))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plug_in_optimizer")
    write_dataset(folder / "data", num_items=NUM_ITEMS)
    return run_on_ranks(plugged_in, 2, folder)


def test_content_trains_by_an_adamw_of_its_own_under_a_steep_sgd(runs: Any) -> None:
    """The first step of AdamW moves a weight by about its rate; that of SGD by the gradient."""
    rates = ContentRates()
    for rank in runs:
        losses, moves, with_state = rank[str(rates)]
        new = {n: m for n, m in moves.items() if n.startswith(("model.content", "contrastive."))}
        assert np.isfinite(losses).all()
        assert 0.5 * rates.learning_rate < max(new.values()) < 1.5 * rates.learning_rate
        assert moves["model.over_arch.model.1.bias"] > 10 * rates.learning_rate
        assert {name.split(".")[1] for name in with_state} >= {"content", "content_head"}
        left_to_sgd = rank["None"][1]
        assert max(left_to_sgd[name] for name in new) > 10 * rates.learning_rate
        assert not any("content" in name for name in rank["None"][2])


def test_a_model_of_ones_own_gets_batches_and_branch(runs: Any) -> None:
    for rank in runs:
        shape, gradient = rank["two tower"]
        assert shape == (BATCH, 16) and gradient > 0
        assert "a Linear" in rank["refused"] and "build_item_content" in rank["refused"]
