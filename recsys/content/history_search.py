"""Long histories: only the items most like the target go on, so many of each history.

MUSE (arXiv 2512.07216) and SIM search a long history before they attend to it. The search is the
cosine of the target's content and that of each item, both from the memory bank; it costs one dot
product per history item. Lookup in the ID table and both attentions then see `top_k` items,
whatever the length of the history. It runs before the batch enters the pipeline, whose next
batches' ids are already on their way, so that the bank's vectors are up to three steps old.

Shapes: B batch, U unique history items, N history items of the batch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import MemoryBank
from recsys.data.batch import Batch


@torch.no_grad()
def shorten_histories(batch: Batch, bank: MemoryBank, top_k: int, index_dedup: bool) -> Batch:
    """A batch, on the host, whose histories keep the `top_k` items most like the target.

    A collective: every rank looks up in the bank. `index_dedup` says whether the batch's
    `sequence_features` hold the unique ids of the histories or all of them.
    """
    ids = torch.cat([batch.target_items, batch.history_items])
    vectors = F.normalize(bank.lookup(ids)[0].cpu(), dim=-1)
    target, items = vectors[: batch.batch_size], vectors[batch.batch_size :]
    history = batch.jagged_history()
    kept = history.highest(history.dot(target, items), top_k)
    index = batch.history_index[kept]
    is_used = index.bincount(minlength=len(items)) > 0
    lengths = batch.history_lengths.clamp(max=top_k)
    unique = batch.history_items[is_used]
    ids = unique if index_dedup else batch.history_items[index]
    return replace(
        batch,
        history_items=unique,
        history_index=(is_used.cumsum(0) - 1)[index],
        history_lengths=lengths,
        history_values=batch.history_values[kept],
        longest_history=min(batch.longest_history, top_k),
        sequence_features=_sequences(batch, ids, None if index_dedup else lengths),
    )


def _sequences(batch: Batch, history: Tensor, lengths: Tensor | None) -> KeyedJaggedTensor:
    """Ids of the target and of the history; `lengths` by row, None where the ids are unique."""
    targets = batch.target_items
    if lengths is None:
        # They belong to no row, but a KeyedJaggedTensor wants every id in one.
        lengths = torch.zeros_like(targets)
        lengths[0] = len(history)
    return KeyedJaggedTensor.from_lengths_sync(
        keys=batch.sequence_features.keys(),
        values=torch.cat([targets, history]),
        lengths=torch.cat([torch.ones_like(targets), lengths]).int(),
    )
