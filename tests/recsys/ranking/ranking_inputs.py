"""Small random inputs of ranking models: three rows, one of them without a history."""

from dataclasses import replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import ContentSettings, HistorySettings, ModalitySettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch, BatchContent, History, Rows, TargetItems
from recsys.ranking.vectors import IDVectors, InputDimensions

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
    num_items=9,
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
        rows=Rows(zeros, zeros),
        target=TargetItems(zeros),
        history=History(
            lengths,
            random(total, 1).sign().clamp(min=0),
            int(lengths.max()),
            torch.arange(total),
            torch.arange(total),
        ),
        content=BatchContent(zeros, zeros, zeros[:0]),
    )
    return ids, content, batch


def one_row(
    batch_inputs: tuple[IDVectors, ContentVectors, Batch], row: int
) -> tuple[IDVectors, ContentVectors, Batch]:
    """The same row as a batch of its own, its history unpadded."""
    ids, content, batch = batch_inputs
    history, history_modalities = content.read_history()
    stop = int(batch.history.lengths[: row + 1].sum())
    events = slice(stop - int(batch.history.lengths[row]), stop)
    this = slice(row, row + 1)
    history_of_row = replace(
        batch.history,
        lengths=batch.history.lengths[this],
        values=batch.history.values[events],
        index=torch.arange(events.stop - events.start),
        items=batch.history.items[events],
    )
    dense = batch.dense_features[this]
    target = replace(batch.target, items=batch.target.items[this])
    alone = replace(batch, dense_features=dense, history=history_of_row, target=target)
    return (
        IDVectors([vectors[this] for vectors in ids.pooled], ids.target[this], ids.history[events]),
        ContentVectors(
            content.target[this],
            history[events],
            content.target_modalities[this],
            history_modalities[events],
        ),
        alone,
    )
