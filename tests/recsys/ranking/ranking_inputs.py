"""Small random inputs of ranking models: three rows, one of them without a history."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import ContentSettings, HistorySettings, ModalitySettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.vectors import IDVectors

ID_DIM, CONTENT_DIM, NUM_DENSE = 4, 6, 2
LENGTHS = torch.tensor([2, 0, 3])
DIMENSIONS = InputDimensions(
    [3, 5],
    ID_DIM,
    NUM_DENSE,
    num_parallel=1,
    num_labels=1,
    pooled_names=("user", "genres"),
    dense_names=("price", "hour"),
    parallel_names=("liked",),
    group="user",
)
MODALITIES = {name: ModalitySettings(kind="feature", column=name) for name in ("clip", "sound")}
CONTENT = ContentSettings(modalities=MODALITIES, dim=CONTENT_DIM, history=HistorySettings())


def inputs(lengths: Tensor = LENGTHS, seed: int = 0) -> tuple[IDVectors, ContentVectors, Batch]:
    generator = torch.Generator().manual_seed(seed)
    rows, total = len(lengths), int(lengths.sum())

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = IDVectors([random(rows, 3), random(rows, 5)], random(rows, ID_DIM), random(total, ID_DIM))
    content = ContentVectors(
        random(rows, CONTENT_DIM),
        random(total, CONTENT_DIM),
        random(rows, len(MODALITIES), CONTENT_DIM),
        random(total, len(MODALITIES), CONTENT_DIM),
    )
    zeros = torch.zeros(rows, dtype=torch.long)
    batch = Batch(
        dense_features=random(rows, NUM_DENSE),
        sparse_features=None,
        labels=torch.zeros(rows, 1),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(["item"], zeros, zeros + 1),
        target_items=zeros,
        groups=zeros,
        row_positions=zeros,
        history_lengths=lengths,
        history_values=random(total, 1).sign().clamp(min=0),
        history_items=torch.arange(total),
        history_index=torch.arange(total),
        content_items=zeros,
        target_index=zeros,
        history_content_index=zeros[:0],
        bank_items=zeros[:0],
        longest_history=int(lengths.max()),
    )
    return ids, content, batch


def one_row(
    parts: tuple[IDVectors, ContentVectors, Batch], row: int
) -> tuple[IDVectors, ContentVectors, Batch]:
    """The same row as a batch of its own, its history unpadded."""
    ids, content, batch = parts
    history, history_modalities = content.read_history()
    stop = int(batch.history_lengths[: row + 1].sum())
    events = slice(stop - int(batch.history_lengths[row]), stop)
    this = slice(row, row + 1)
    alone = replace(
        batch,
        dense_features=batch.dense_features[this],
        history_lengths=batch.history_lengths[this],
        history_values=batch.history_values[events],
        history_items=batch.history_items[events],
        history_index=torch.arange(events.stop - events.start),
    )
    return (
        IDVectors([part[this] for part in ids.pooled], ids.target[this], ids.history[events]),
        ContentVectors(
            content.target[this],
            history[events],
            content.target_modalities[this],
            history_modalities[events],
        ),
        alone,
    )
