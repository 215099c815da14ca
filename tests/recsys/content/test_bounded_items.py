"""Ranked items whose rows are learned in training: row, moments and bank vector go together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.checkpoint.state import TrainingState
from recsys.config import ContrastiveSettings, OptimizerSettings
from recsys.config.ranking import ranking_settings
from recsys.data.batch import Batch
from recsys.data.schema import load_schema
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import joined_ranks
from recsys.model.tables import table_configs
from recsys.storage.location import Location
from tests.ranks import run_on_ranks
from tests.recsys.content.churning_items import (
    Trained,
    batches,
    build,
    content,
    raw,
    train,
    write_churn,
)
from tests.recsys.em3_runs import em3_config, ranks_of

AT_REST = OptimizerSettings(
    learning_rate=0.0, content_learning_rate=0.0, encoder_learning_rate=0.0, weight_decay=0.0
)
WEIGHT = "model.embeddings.embeddings.item.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_churn(tmp_path_factory.mktemp("churn") / "data")


def ids_of(vocabulary: BoundedVocabulary) -> dict[int, int]:
    """The row of each id that has one."""
    sets = vocabulary._sets
    used_rows = np.flatnonzero(sets.last_used.ravel() >= 0)
    return {int(sets.ids.ravel()[row]): int(row) for row in used_rows}


def test_batches_whose_raw_ids_became_rows_are_pinned_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU nothing is pinned: a set of addresses stands for page-locked memory."""
    pinned: set[int] = set()

    def pin(batch: Batch) -> Batch:
        pinned.add(batch.target.items.data_ptr())
        return batch

    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    monkeypatch.setattr(Batch, "pin_memory", pin)
    with joined_ranks("cpu") as ranks:
        job = build(data, ranks, tmp_path)
        loaded = [batch.pin_memory() for batch in batches(job, 2)]
        prepared = list(job.preparation(iter(loaded), UnknownIds(job.schema), 0, training=True))
    assert all(batch.target.items.is_pinned() for batch in prepared)


def test_a_batch_has_rows_for_tables_and_raw_ids_for_content(data: Path, tmp_path: Path) -> None:
    with joined_ranks("cpu") as ranks:
        job = build(data, ranks, tmp_path)
        prepared = list(job.preparation(batches(job, 2), UnknownIds(job.schema), 0, training=True))
        assert job.vocabularies.items is not None
        rows = ids_of(job.vocabularies.items)
        first, second = ([int(raw(item)) for item in items] for items in ((0, 1, 2), (2, 3, 4)))
        assert prepared[0].target.frequency_keys.tolist() == [*first, first[0]]
        assert prepared[0].target.items.tolist() == [rows[item] for item in [*first, first[0]]]
        assert prepared[0].target.has_row is not None and prepared[0].target.has_row.all()
        # Item 3 is in histories alone: it is encoded in the step that gives it a row, and no more.
        assert prepared[0].content.items.tolist() == [*first, int(raw(3))]
        assert prepared[0].content.with_gradient == 3
        write_rows = prepared[0].content.bank_write_rows.tolist()
        assert write_rows == [rows[int(raw(item))] for item in range(4)]
        assert prepared[1].content.items.tolist() == [*second, int(raw(5))]
        events = prepared[0].history.items[prepared[0].history.index].tolist()
        expected = [3, 3, 1, 3, 2, 3, 0]
        assert events == [rows[int(raw(item))] for item in expected]
        assert prepared[0].sequence_features["history"].values().tolist() == [
            rows[int(raw(item))] for item in range(4)
        ]
        # Every event is a use, however often a batch looks its item up.
        sets = job.vocabularies.items._sets
        assert sets.scores.ravel()[rows[int(raw(0))]] == 3


def test_evicted_and_readmitted_items_have_fresh_rows_and_their_own_content(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights at rest, a vector in the bank is the same whenever it was written."""
    with joined_ranks("cpu") as ranks:
        job = build(data, ranks, tmp_path, optimizer=AT_REST, table_optimizer="rowwise_adagrad")
        table = job.model.state_dict()["embeddings.embeddings.item.weight"].local_shards()[0].tensor
        initial = table.detach().clone()
        vocabulary, bank = job.vocabularies.items, job.em3.content.bank
        assert vocabulary is not None and bank is not None
        reset, reset_rows = job.vocabularies.reset, []

        def watched(name: str, rows: Tensor) -> None:
            assert reset is not None
            assert (bank._rows[rows, -1] > 0).all()  # of the old item
            reset(name, rows)
            assert torch.equal(table[rows], initial[rows])
            assert not bank._rows[rows].any()
            reset_rows.extend(rows.tolist())

        monkeypatch.setattr(job.vocabularies, "reset", watched)
        trained = train(job)
        assert len(reset_rows) > 3
        rows = ids_of(vocabulary)
        assert {int(raw(0)), int(raw(1)), int(raw(2))} <= rows.keys()  # they came back
        job.em3.content.eval()
        assert job.store is not None
        ids = np.array(list(rows))
        with torch.no_grad():
            vectors = job.em3.content.encode(job.store.gather(ids))
        torch.testing.assert_close(bank._rows[list(rows.values()), :-1], vectors)
        free_rows = np.setdiff1d(np.arange(17), list(rows.values()))
        assert not bank._rows[free_rows].any()
        moments = next(name for name in trained.state if name.startswith("optimizer.tables"))
        # An item that came back was updated in the steps since alone, so its row has moved little.
        assert (trained.full_tensor(moments)[free_rows] == 0).all()


def test_the_average_of_a_row_begins_anew_with_another_item(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = OptimizerSettings(ema_decay=0.9, ema_tables=True)
    with joined_ranks("cpu") as ranks:
        job = build(data, ranks, tmp_path, optimizer=optimizer, table_optimizer="rowwise_adagrad")
        state = TrainingState(job).state_dict()
        average = state["optimizer.average.embeddings.embeddings.item.weight"]
        assert isinstance(average, ShardedTensor)
        values = average.local_shards()[0].tensor
        initial, reset = values.clone(), job.vocabularies.reset
        changed_rows: list[int] = []
        assert reset is not None

        def watched(name: str, rows: Tensor) -> None:
            changed_rows.extend(rows[(values[rows] != initial[rows]).any(dim=1)].tolist())
            reset(name, rows)
            assert torch.equal(values[rows], initial[rows])

        monkeypatch.setattr(job.vocabularies, "reset", watched)
        train(job)
        assert changed_rows


def train_on_rank(rank: int, world_size: int, data: Path, cache: Path) -> list[Trained]:
    ranks = ranks_of(rank, world_size)
    return [train(build(data, ranks, cache, **settings)) for settings in SETTINGS]


SETTINGS: list[dict[str, Any]] = [
    {"sharding": "row_wise"},
    {"sharding": "row_wise", "content": replace(content(bank="sharded"), dedup="global")},
]


def test_two_ranks_train_as_one(data: Path, tmp_path: Path) -> None:
    with joined_ranks("cpu") as ranks:
        expected = train(build(data, ranks, tmp_path, sharding="row_wise"))
    for first, second in zip(*run_on_ranks(train_on_rank, 2, data, tmp_path), strict=True):
        for name in ("vocabulary.item.ids", "vocabulary.item.last_used"):
            assert torch.equal(first.full_tensor(name, second), expected.full_tensor(name))
        for name in ("bank", WEIGHT):
            actual = first.full_tensor(name, second)
            torch.testing.assert_close(actual, expected.full_tensor(name), rtol=1e-4, atol=1e-5)
        logits = [
            torch.cat(step_logits) for step_logits in zip(first.logits, second.logits, strict=True)
        ]
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_rows_are_protected_for_as_many_steps_as_batches_are_mapped_ahead(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined_ranks("cpu") as ranks:
        job = build(data, ranks, tmp_path)
        branch, map_batch = job.em3.content, job.vocabularies.map_batch
        assert branch is not None and job.vocabularies.items is not None
        mapped: list[int] = []
        ahead: list[int] = []

        def note(batch: Batch, step: int, training: bool) -> None:
            map_batch(batch, step, training)
            mapped.append(step)

        monkeypatch.setattr(job.vocabularies, "map_batch", note)
        hook = branch.register_forward_pre_hook(
            lambda module, inputs: ahead.append(mapped[-1] - branch.step)
        )
        train(job)
        hook.remove()
        assert max(ahead) == job.vocabularies.items._sets.protect_steps


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"encoder_share": 0.5}, r"encoder_share is 0\.5.*'item'.*bounded"),
        ({"ranking": ("two_tower", {"loss": "sampled_softmax"})}, "sampled_softmax.*'item'"),
    ],
)
def test_a_setting_that_needs_rows_from_the_start_is_refused(
    data: Path, tmp_path: Path, settings: dict[str, Any], line: str
) -> None:
    config = em3_config(tmp_path, content=content())
    if "encoder_share" in settings:
        assert not isinstance(config.content, str)
        config.content.encoder_share = settings["encoder_share"]
    else:
        name, options = settings["ranking"]
        config.ranking = ranking_settings(name, **options)
    with pytest.raises(ValueError, match=line):
        table_configs(config, load_schema(Location.of(data)))


def test_items_without_a_row_do_not_link_content_and_id(data: Path, tmp_path: Path) -> None:
    with joined_ranks("cpu") as ranks:
        job = build(data, ranks, tmp_path, contrastive=ContrastiveSettings(weight=0.5, dim=8))
        (batch,) = job.preparation(batches(job, 1), UnknownIds(job.schema), 0, training=False)
        assert batch.target.has_row is not None and not batch.target.has_row.any()
        assert batch.contrastive_weights.tolist() == [0.0] * 4
