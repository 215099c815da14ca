"""Batches of a user's own dataset keep what they are and gain the content of their items."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.models.dlrm import DLRMTrain
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import ContrastiveSettings
from recsys.data.batch import Batch
from recsys.distributed.ranks import joined_ranks
from recsys.plug_in import DLRMWithContent, add_content
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.plug_in.plug_in_runs import NUM_ITEMS, build_dlrm, plug_in_settings, user_batches

CPU = torch.device("cpu")


def plugged_in(folder: Path, **changed: Any) -> DLRMWithContent:
    return add_content(build_dlrm("dlrm", "cpu"), plug_in_settings(folder, **changed), CPU)


def message_of(action: Any) -> str:
    """What a ValueError of the action says; empty without one."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def altered(rank: int, name: str, ids: list[int], lengths: list[int]) -> list[TorchRecBatch]:
    """Rank 1's second batch has other ids in one feature."""
    batches = user_batches(rank, 3)
    features = batches[1].sparse_features.to_dict()
    values = {key: (feature.values(), feature.lengths()) for key, feature in features.items()}
    values[name] = (torch.tensor(ids), torch.tensor(lengths, dtype=torch.int32))
    changed = KeyedJaggedTensor.from_lengths_sync(
        list(values),
        torch.cat([ids for ids, _ in values.values()]),
        torch.cat([lengths for _, lengths in values.values()]),
    )
    if rank == 1:
        batches[1] = replace(batches[1], sparse_features=changed)
    return batches


def without_history(folder: Path, source: list[TorchRecBatch]) -> tuple[int, float]:
    """Items in the histories of a batch, and the share of items in the bank."""
    dlrm = plugged_in(folder, history=None)
    batch = next(iter(dlrm.batches(source)))
    assert dlrm.content.branch.bank is not None
    return len(batch.history.index), dlrm.content.branch.bank.coverage()


def gathered(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    dlrm = plugged_in(folder)
    source = user_batches(rank, 3)
    batches = dlrm.batches(source)
    passes = [list(batches), list(batches)]
    two_ids = altered(rank, "item", [1, 2, 3, 4, 5, 6], [1, 2, 0, 1, 1, 1])
    outside = altered(rank, "viewed", [4, NUM_ITEMS], [2, 0, 0, 0, 0, 0])
    content = plug_in_settings(folder).content
    extra_content = replace(content, history=replace(content.history, columns=["bought"]))
    return {
        "kept": [
            ours.dense_features is theirs.dense_features
            and ours.sparse_features is theirs.sparse_features
            and ours.labels is theirs.labels
            for ours, theirs in zip(passes[1], source)
        ],
        "batch": passes[0][0],
        "expected": source[0],
        "lengths": [len(batches), *map(len, passes)],
        "uneven": len(list(dlrm.batches(source[: 3 - rank]))),
        "several": message_of(lambda: list(dlrm.batches(two_ids))),
        "outside": message_of(lambda: list(dlrm.batches(outside))),
        "absent": message_of(lambda: list(plugged_in(folder, history="user2").batches(source))),
        "no_items": message_of(lambda: plugged_in(folder / "nowhere")),
        "no_feature": message_of(lambda: plugged_in(folder, item="product", item_column="item")),
        "further": message_of(lambda: plugged_in(folder, content=extra_content)),
        "filled": dlrm.content.branch.bank.coverage(),
        "unread": without_history(folder, source),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plug_in_batches")
    write_dataset(folder / "data", num_items=NUM_ITEMS)
    return run_on_ranks(gathered, 2, folder)


def test_dense_and_sparse_features_and_labels_are_handed_on_untouched(results: Any) -> None:
    for rank in results:
        assert rank["kept"] == [True] * 3


def histories(batch: TorchRecBatch) -> Iterator[np.ndarray]:
    viewed = batch.sparse_features["viewed"]
    yield from np.split(viewed.values().numpy(), np.cumsum(viewed.lengths().numpy())[:-1])


def test_items_and_histories_are_those_of_the_named_features(results: Any) -> None:
    for rank in results:
        batch, theirs = rank["batch"], rank["expected"]
        assert isinstance(batch, Batch) and batch.batch_size == theirs.labels.shape[0]
        items = theirs.sparse_features["item"].values()
        assert torch.equal(batch.target.items, items)
        assert torch.equal(batch.content.items[batch.content.target_index], items)
        assert len(batch.content.inputs["clip"].values) == len(batch.content.items.unique())
        ours = np.split(
            batch.history.items[batch.history.index].numpy(),
            np.cumsum(batch.history.lengths.numpy())[:-1],
        )
        assert [list(row) for row in ours] == [list(row) for row in histories(theirs)]
        assert bool((batch.rows.loss_weights == 1).all())


def test_batches_can_be_iterated_again_and_have_the_length_of_their_source(
    results: Any,
) -> None:
    assert [rank["lengths"] for rank in results] == [[3, 3, 3]] * 2


def test_all_ranks_end_with_the_one_that_has_the_fewest_batches(results: Any) -> None:
    assert [rank["uneven"] for rank in results] == [2, 2]


def test_every_rank_ends_with_the_cause_that_one_has_met(results: Any) -> None:
    for rank in results:
        assert "'item' has 2 ids" in rank["several"]
        assert "sparse feature 'viewed': id 30 is outside [0, 30)" in rank["outside"]
        assert "'user2'; they have ['item', 'viewed', 'user']" in rank["absent"]
        assert "no *.parquet files" in rank["no_items"]
        assert "no sparse feature 'product'; it has" in rank["no_feature"]
        assert "content.history.columns" in rank["further"]


def test_the_bank_is_filled_before_the_first_batch_if_it_is_read(results: Any) -> None:
    for rank in results:
        assert rank["filled"] == 1.0
        assert rank["unread"] == (0, 0.0)


def test_without_a_process_group_the_fix_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group"):
        plugged_in(tmp_path)


class CustomLoss(DLRMTrain):
    def forward(self, batch: TorchRecBatch) -> Any:
        loss, outputs = super().forward(batch)
        return 2 * loss, outputs


def test_the_loss_is_the_users_loss_fn_and_one_of_another_forward_is_refused(
    tmp_path: Path,
) -> None:
    write_dataset(tmp_path / "data", num_items=NUM_ITEMS)
    train_model, (user_batch,) = DLRMTrain(build_dlrm("dlrm", "cpu")), user_batches(0, 1)
    train_model.loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(5.0))
    settings = plug_in_settings(tmp_path, contrastive=ContrastiveSettings(), optimizer=None)
    expected = train_model(user_batch)[0]

    with joined_ranks("cpu"):
        with_content = add_content(train_model, settings, CPU)
        (batch,) = with_content.batches([user_batch])
        torch.testing.assert_close(with_content(batch)[0], expected)
        with pytest.raises(ValueError, match="CustomLoss computes a loss of its own"):
            add_content(CustomLoss(build_dlrm("dlrm", "cpu")), settings, CPU)
