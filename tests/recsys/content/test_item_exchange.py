"""Encoding each item once in the cluster equals encoding it on every rank that needs it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import Config, ContentSettings
from recsys.content.batch_preparation import assign_to_owners
from recsys.content.branch import exchange_vectors
from recsys.data.batch import BatchContent
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.content.item_batches import batch_of_items
from tests.recsys.em3_runs import STEPS, TABLES, Run, em3_config, full_table, train_configs

MODES = ("bank_lora", "full")
TOLERANCE = 1e-6


def configs(folder: Path) -> dict[Any, Config]:
    """By (history mode, dedup)."""
    config = em3_config(folder)
    content = config.content
    assert isinstance(content, ContentSettings)
    return {
        (mode, dedup): replace(
            config,
            content=replace(content, dedup=dedup, history=replace(content.history, mode=mode)),
        )
        for mode in MODES
        for dedup in ("local", "global")
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Run]]:
    folder = tmp_path_factory.mktemp("exchange")
    write_dataset(folder / "data")
    return run_on_ranks(train_configs, 3, folder, configs(folder))


@pytest.mark.parametrize("mode", MODES)
def test_losses_logits_and_gradients_equal_those_of_each_rank_encoding_its_own(
    runs: list[dict[Any, Run]], mode: str
) -> None:
    for run in runs:
        shared, separate = run[mode, "global"], run[mode, "local"]
        for step in range(STEPS):
            torch.testing.assert_close(
                shared.losses[step], separate.losses[step], rtol=0, atol=TOLERANCE
            )
            torch.testing.assert_close(
                shared.logits[step], separate.logits[step], rtol=0, atol=TOLERANCE
            )
        # Of the first step, as AdamW turns rounding into the direction of a step.
        assert shared.gradients[0].keys() == separate.gradients[0].keys()
        for name, gradient in shared.gradients[0].items():
            torch.testing.assert_close(
                gradient, separate.gradients[0][name], rtol=0, atol=TOLERANCE, msg=name
            )


@pytest.mark.parametrize("mode", MODES)
def test_tables_move_as_when_each_rank_encodes_its_own(
    runs: list[dict[Any, Run]], mode: str
) -> None:
    for name in TABLES:
        shared, separate = (
            full_table([run[mode, dedup] for run in runs], 1, name) for dedup in ("global", "local")
        )
        torch.testing.assert_close(shared, separate, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_each_item_of_the_global_batch_is_encoded_exactly_once(
    runs: list[dict[Any, Run]], mode: str
) -> None:
    repeated = 0
    for step in range(STEPS):
        requested = torch.cat([run[mode, "local"].encoded[step] for run in runs])
        encoded = torch.cat([run[mode, "global"].encoded[step] for run in runs])
        repeated += len(requested) - len(requested.unique())
        assert encoded.sort().values.tolist() == requested.unique().tolist()
        for rank, run in enumerate(runs):
            assert (run[mode, "global"].encoded[step] % len(runs) == rank).all()
    assert repeated or mode != "full"  # with the histories some are wanted by several ranks


def exchange(
    rank: int, world_size: int, requested: list[list[int]]
) -> tuple[BatchContent, Tensor, Tensor]:
    """(the assigned content, vectors received, gradient of the vectors sent)."""
    group = dist.group.WORLD
    assert group is not None
    content = assign_to_owners(batch_of_items(requested[rank]).content, group)
    assert content.exchange is not None
    vectors = content.items.unsqueeze(1) * torch.ones(1, 3)
    vectors.requires_grad_()
    received = exchange_vectors(vectors, content.exchange, group)
    ((rank + 1) * received).sum().backward()
    assert vectors.grad is not None
    return content, received.detach(), vectors.grad


def test_vectors_reach_those_who_need_them_and_gradients_add_up_at_their_owners() -> None:
    requested = [[3, 5, 3, 8], [8, 3], [5]]  # nobody wants an item of rank 1
    results = run_on_ranks(exchange, 3, requested)
    for targets, (content, received, _) in zip(requested, results):
        assert received[content.target_index, 0].tolist() == targets
    owned = [content.items.tolist() for content, _, _ in results]
    assert owned == [[3], [], [5, 8]]
    # Rank r multiplies by r + 1; item 3 goes to ranks 0 and 1, 5 to 0 and 2, 8 to 0 and 1.
    gradients = [gradient[:, 0].tolist() for _, _, gradient in results]
    assert gradients == [[3.0], [], [4.0, 3.0]]
