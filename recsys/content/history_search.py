"""Shortens long histories to the items most similar to the target.

MUSE (arXiv 2512.07216) and SIM search a long history before they attend to it. Here items are
ranked by the cosine of the target's content and their own, both from the memory bank; the search
costs one dot product per history item. The lookup in the ID table and both attentions then see
`top_k` items, whatever the length of the history. The search runs before the batch enters the
pipeline, which already sends the ids of later batches, so the bank's vectors are up to three steps
old.

Shapes: B batch, U unique history items, N history items of the batch, K history items kept.
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
    """Keep the top-k history items by cosine similarity to the target. A collective.

    Every rank looks up in the bank.

    Args:
        batch: on the host.
        bank: memory bank of content vectors.
        top_k: items kept of each history, at most.
        index_dedup: whether the batch's `sequence_features` hold the unique ids of the histories or
            all ids.

    Returns:
        the batch with shortened histories, on the host.
    """
    ids = torch.cat([batch.target_items, batch.history_items])
    if bank.device.type == "cuda":
        # The pipeline fetches its batches on another stream than that of the steps, which write.
        steps = torch.cuda.default_stream(bank.device)
        torch.cuda.current_stream(bank.device).wait_stream(steps)
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


def _sequences(
    batch: Batch,
    history: Tensor,  # [U] or [K]
    lengths: Tensor | None,  # [B]
) -> KeyedJaggedTensor:
    """Return the sequence features with other ids of the history; no `lengths` for unique ids."""
    targets = batch.target_items  # rows
    if lengths is None:
        # Unique ids belong to no row, but a KeyedJaggedTensor requires one: the first.
        lengths = torch.zeros_like(targets)
        lengths[0] = len(history)
    features, size = batch.sequence_features, 2 * len(targets)
    others = features.values()[sum(features.length_per_key()[:2]) :], features.lengths()[size:]
    return KeyedJaggedTensor.from_lengths_sync(
        keys=features.keys(),
        values=torch.cat([targets, history, others[0]]),
        lengths=torch.cat([torch.ones_like(targets), lengths, others[1]]).int(),
    )
