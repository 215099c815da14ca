"""Batches of nothing but items: targets, and histories where they are wanted."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.data.batch import Batch, BatchContent, History, Rows, TargetItems


def batch_of_items(targets: list[int], histories: list[list[int]] | None = None) -> Batch:
    """A batch as the loader makes it, whose content is not read yet.

    The parallel list of the histories numbers their places.
    """
    rows = len(targets)
    target = torch.tensor(targets)
    histories = histories or [[] for _ in targets]
    lengths = torch.tensor([len(history) for history in histories])
    events = torch.tensor([item for history in histories for item in history], dtype=torch.long)
    history_items, history_index = events.unique(return_inverse=True)
    content_items, target_index = target.unique(return_inverse=True)
    history_rows = torch.zeros(rows, dtype=torch.long)
    history_rows[0] = len(history_items)
    return Batch(
        dense_features=torch.zeros(rows, 0),
        sparse_features=None,
        labels=torch.zeros(rows, 1),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            ["item", "history"],
            torch.cat([target, history_items]),
            torch.cat([torch.ones_like(target), history_rows]).int(),
        ),
        rows=Rows(torch.arange(rows), torch.zeros(rows, dtype=torch.long)),
        target=TargetItems(target),
        history=History(
            lengths,
            torch.arange(len(events)).float().unsqueeze(1),
            int(lengths.max()),
            history_index,
            history_items,
        ),
        content=BatchContent(content_items, target_index, target[:0]),
    )
