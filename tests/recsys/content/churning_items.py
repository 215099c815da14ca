"""Items that come, go and come back, in a table with room for about half of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.build import Job, build_job
from recsys.checkpoint.state import TrainingState
from recsys.config import ContentSettings, FusionSettings, HistorySettings, ModalitySettings
from recsys.data.batch import Batch
from recsys.data.parquet.rows import ParquetRows
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import Ranks
from tests.datasets import FEATURE_WIDTH, write_parquet
from tests.recsys.em3_runs import em3_config

SCHEMA = """\
target_item: item
group: user
columns:
  user:    {kind: id, num_embeddings: 5}
  item:    {kind: id, num_embeddings: 17, vocabulary: {kind: bounded}}
  history: {kind: sequence, shares: item, parallel: [history_liked]}
  liked:   {kind: label}
items:
  id: item
  columns:
    clip: {kind: feature}
"""
GLOBAL_BATCH = 4
FIRST_ITEM = [0, 2, 4, 6, 8, 10, 12, 14, 0, 2]  # of each step; the first items come back
NUM_ITEMS = 20


def raw(item: Any) -> Any:
    """Ids that are no rows: far apart, some negative."""
    return np.asarray(item) * 1_000_000_007 - 3_000_000_000


def write_churn(folder: Path) -> Path:
    """Four items are ranked in a step, one more is in histories alone, and the next step has two
    new ones."""
    rows: dict[str, list[Any]] = {"user": [], "item": [], "history": [], "liked": []}
    for step, first in enumerate(FIRST_ITEM):
        for row in range(GLOBAL_BATCH):
            rows["user"].append((step + row) % 5)
            rows["item"].append(int(raw(first + row % 3)))
            history = [first + 3, *([first + row % 3] if row else [])]
            rows["history"].append(raw(history).tolist())
            rows["liked"].append(float((first + row) % 2))
    rows["history_liked"] = [[1.0] * len(history) for history in rows["history"]]
    folder.mkdir(parents=True)
    (folder / "schema.yaml").write_text(SCHEMA)
    floats = {"liked": pa.float32(), "history_liked": pa.list_(pa.float32())}
    table = pa.table({name: pa.array(values, floats.get(name)) for name, values in rows.items()})
    for split in ("train", "valid", "test"):
        write_parquet(folder / split / "part-0.parquet", table)
    clips = np.random.default_rng(0).random((NUM_ITEMS, FEATURE_WIDTH)).astype(np.float32)
    items = {"item": raw(np.arange(NUM_ITEMS)), "clip": pa.array(list(clips))}
    write_parquet(folder / "items" / "part-0.parquet", pa.table(items))
    return folder


def content(**history: Any) -> ContentSettings:
    return ContentSettings(
        {"clip": ModalitySettings("feature", "clip")},
        dim=16,
        fusion=FusionSettings(num_heads=2, dropout=0.0),
        history=HistorySettings(lora_rank=2, **history),
    )


def build(data: Path, ranks: Ranks, cache: Path, **settings: Any) -> Job:
    values = {"content": content(), "batch_size": GLOBAL_BATCH // ranks.world_size}
    return build_job(em3_config(cache, **(values | settings)), str(data), ranks)


def batches(job: Job, num_steps: int = len(FIRST_ITEM)) -> Iterator[Batch]:
    """The rank's rows of each step: together the ranks have the same rows, however many."""
    rows = ParquetRows.of_split(job.root, "train", job.schema)
    per_rank, build_batch = GLOBAL_BATCH // job.ranks.world_size, job.batch_builder()
    for step in range(num_steps):
        first = step * GLOBAL_BATCH + job.ranks.rank * per_rank
        yield build_batch(next(rows.read(first, first + per_rank)))


@dataclass
class Trained:
    """Logits of the steps, and the state after them, in shards with their offsets."""

    logits: list[Tensor]
    state: dict[str, list[tuple[list[int], Tensor]]]

    def full_tensor(self, name: str, *other_ranks: Trained) -> Tensor:
        """A tensor of all ranks."""
        shards = [shard for rank in (self, *other_ranks) for shard in rank.state[name]]
        sizes = [
            [offset + size for offset, size in zip(*bounds, strict=True)]
            for bounds in ((offsets, list(tensor.shape)) for offsets, tensor in shards)
        ]
        result = torch.full([max(size) for size in zip(*sizes)], 77, dtype=shards[0][1].dtype)
        for offsets, tensor in shards:
            sides = zip(offsets, tensor.shape, strict=True)
            result[tuple(slice(first, first + size) for first, size in sides)] = tensor
        return result


def train(job: Job) -> Trained:
    """Train on the batches through the pipeline, a collective."""
    job.model.train()
    job.pipeline.begin(len(FIRST_ITEM))
    prepared = job.preparation(batches(job), UnknownIds(job.schema), 0, training=True)
    logits = [logits.detach().clone() for _, logits, _ in job.pipeline.outputs(prepared)]
    state = TrainingState(job).state_dict()
    state_names = ("bank", "vocabulary.item.ids", "vocabulary.item.last_used")
    names = [name for name in state if name in state_names or ".item.weight" in name]
    shards = {}
    for name in names:
        value = state[name]
        assert isinstance(value, ShardedTensor)
        shards[name] = [
            (list(shard.metadata.shard_offsets), shard.tensor.detach().clone())
            for shard in value.local_shards()
        ]
    return Trained(logits, shards)
