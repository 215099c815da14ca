"""Negatives are drawn of the items that are counted."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recsys.data.item_frequency
from recsys.config import RetrievalSettings
from recsys.data.item_frequency import ItemCounts, count_items
from recsys.data.negatives import NegativeSampler
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.content.item_batches import batch_of_items
from tests.recsys.em3_runs import ranks_of

NUM_ITEMS, TARGETS = 5, [4, 1, 1]
HISTORIES = [[0, 2], [], [2]]
COUNTS = ItemCounts(np.array([0, 1, 3, 4]), np.array([10, 40, 30, 20]))


def sampler(**settings: Any) -> NegativeSampler:
    negative_sampler = NegativeSampler(RetrievalSettings(**settings), NUM_ITEMS, "item")
    negative_sampler.counts = COUNTS
    return negative_sampler


def test_in_batch_q_is_an_item_s_share_of_the_training_rows() -> None:
    in_batch = sampler(loss="in_batch_softmax")
    batch = in_batch(batch_of_items(TARGETS, HISTORIES), (0, 0, 0), training=True)
    assert batch.target.log_q is not None and batch.negatives is None
    assert batch.target.log_q.exp().tolist() == pytest.approx([0.2, 0.4, 0.4])
    assert batch.sequence_features.keys() == ["item", "history"]


@pytest.mark.parametrize("loss", ["in_batch_softmax", "sampled_softmax"])
def test_without_the_correction_log_q_is_zero(loss: str) -> None:
    plain = sampler(loss=loss, log_q_correction=False, num_negatives=3)
    batch = plain(batch_of_items(TARGETS, HISTORIES), (0, 0, 0), training=True)
    assert batch.target.log_q is not None and batch.target.log_q.tolist() == [0, 0, 0]
    if loss == "sampled_softmax":
        assert batch.negatives is not None and batch.negatives.log_q.tolist() == [0, 0, 0]


def test_items_are_drawn_as_often_as_q_says() -> None:
    negatives = sampler(loss="sampled_softmax", num_negatives=20_000)
    batch = negatives(batch_of_items(TARGETS, HISTORIES), (0, 0, 0), training=True)
    assert batch.negatives is not None
    q = negatives.log_q(torch.from_numpy(COUNTS.items)).exp()
    assert float(q.sum()) == pytest.approx(1)
    share = batch.negatives.items.bincount(minlength=NUM_ITEMS) / 20_000
    assert share[2] == 0  # an item without training rows was not known
    assert share[COUNTS.items].tolist() == pytest.approx(q.tolist(), abs=0.02)
    assert torch.equal(batch.negatives.log_q, negatives.log_q(batch.negatives.items))
    assert batch.target.log_q is not None
    assert torch.equal(batch.target.log_q, negatives.log_q(torch.tensor(TARGETS)))
    assert q.tolist() == pytest.approx([0.25] * 4)


def test_full_softmax_has_every_item_with_training_rows_once() -> None:
    every_item = sampler(loss="full_softmax")
    batch = every_item(batch_of_items(TARGETS, HISTORIES), (0, 0, 0), training=True)
    assert batch.negatives is not None and batch.target.log_q is not None
    assert batch.negatives.items.tolist() == COUNTS.items.tolist()
    assert not batch.negatives.log_q.any() and not batch.target.log_q.any()
    scored = every_item(batch_of_items(TARGETS, HISTORIES), (0, 0, 0), training=False)
    assert scored.negatives is not None and not len(scored.negatives.items)


def test_negatives_are_a_feature_of_the_item_table_behind_target_and_history() -> None:
    negative_sampler = sampler(loss="sampled_softmax", num_negatives=6)
    old_batch = batch_of_items(TARGETS, HISTORIES)
    batch = negative_sampler(old_batch, (0, 0, 0), training=True)
    features = batch.sequence_features
    assert features.keys() == ["item", "history", "negatives of item"]
    assert batch.negatives is not None
    assert features["negatives of item"].values().tolist() == batch.negatives.items.tolist()
    for name in ("item", "history"):
        old, new = old_batch.sequence_features[name], features[name]
        assert torch.equal(new.values(), old.values())
        assert torch.equal(new.lengths(), old.lengths())


def test_a_draw_depends_on_seed_step_and_rank_alone() -> None:
    negative_sampler = sampler(loss="sampled_softmax", num_negatives=50)

    def draw(*case: int) -> list[int]:
        batch = negative_sampler(batch_of_items(TARGETS), case, training=True)  # type: ignore[arg-type]
        assert batch.negatives is not None
        return batch.negatives.items.tolist()

    assert draw(0, 3, 1) == draw(0, 3, 1)
    assert len({tuple(draw(*case)) for case in [(0, 3, 1), (1, 3, 1), (0, 4, 1), (0, 3, 0)]}) == 4


def test_outside_training_nothing_is_drawn() -> None:
    negative_sampler = sampler(loss="sampled_softmax")
    batch = negative_sampler(batch_of_items(TARGETS, HISTORIES), (0, 0, 0), training=False)
    assert batch.negatives is not None and len(batch.negatives.items) == 0
    assert batch.sequence_features["negatives of item"].values().numel() == 0


@pytest.mark.parametrize("loss", ["in_batch_softmax", "sampled_softmax"])
def test_memory_does_not_grow_with_the_table(loss: str) -> None:
    num_items = 1 << 40  # counts of all would take 8 TiB
    items = np.random.default_rng(0).choice(num_items // 1000, 1000, replace=False) * 1000
    counts = ItemCounts(np.sort(items), np.arange(1000, 2000))
    tracemalloc.start()
    try:
        settings = RetrievalSettings(loss=loss, num_negatives=1000)
        negative_sampler = NegativeSampler(settings, num_items, "item")
        negative_sampler.counts = counts
        targets = [*counts.items[:50].tolist(), num_items - 1]
        batch = negative_sampler(batch_of_items(targets), (0, 0, 0), training=True)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert batch.target.log_q is not None and bool((batch.target.log_q < 0).all())
    if loss == "sampled_softmax":
        assert batch.negatives is not None
        assert set(batch.negatives.items.tolist()) <= set(counts.items.tolist())


MANY = 1 << 40  # ids, whose counts would take 8 TiB


def counted(root: Path, rank: int, world_size: int) -> ItemCounts:
    """Items of a rank's share, of a schema that has an id for many more."""
    schema = load_schema(Location.of(root))
    columns = {**schema.columns, "item": replace(schema.columns["item"], num_embeddings=MANY)}
    wide = replace(schema, columns=columns)
    assert wide.num_items == MANY
    return count_items(ParquetRows.of_split(Location.of(root), "train", wide), rank, world_size)


def add_up(rank: int, world_size: int, root: Path) -> tuple[list[int], list[int]]:
    recsys.data.item_frequency.BLOCK = 7 if world_size == 2 else 1 << 24
    size = 30 if world_size == 2 else MANY
    total = counted(root, rank, world_size).sum_of_ranks(size, ranks_of(rank, world_size))
    return total.items.tolist(), total.counts.tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_items_are_counted_over_all_ranks_without_memory_for_all_ids(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_dataset(tmp_path, {"train": 61})
    full = counted(root, 0, 1)
    assert full.counts.sum() == 61 and (np.diff(full.items) > 0).all()
    first, *other_ranks = run_on_ranks(add_up, world_size, root)
    assert first == (full.items.tolist(), full.counts.tolist())
    assert all(result == ([], []) for result in other_ranks)
    monkeypatch.setattr(recsys.data.item_frequency, "MIN_MERGED", 1)  # after each chunk
    assert counted(root, 0, 1).counts.tolist() == full.counts.tolist()


def test_counts_are_stored_and_looked_up(tmp_path: Path) -> None:
    queries = np.array([5, 4, 4, 0, 1, 900])
    ItemCounts(np.array([1, 4]), np.array([3, 1])).save(tmp_path / "counts.npy")
    counts = ItemCounts.load(tmp_path / "counts.npy")
    assert counts.of(queries).tolist() == [0, 1, 1, 0, 3, 0]
    assert counts.of(np.arange(6)).tolist() == [0, 3, 0, 0, 1, 0]
    nothing = ItemCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert nothing.of(queries).tolist() == [0] * 6
