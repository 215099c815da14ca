"""Prepares batches between the loader and the pipeline; most steps are collectives.

The choice of the items that a rank encodes in a step works on the host.
Shapes: B batch, U unique history items, N history items of the batch, K history items kept,
R items that this rank needs, E items that it owns and some rank needs, W ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from embeddings import MemoryBank
from embeddings.host import is_host
from embeddings.memory_bank import Routes
from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.config import ContentSettings
from recsys.content.encoder_outputs import EncoderOutputs
from recsys.data.batch import Batch, BatchContent, EncodedItems, ItemExchange, Rows
from recsys.data.items.content_store import ContentStore
from recsys.data.negatives import NegativeSampler, with_ids
from recsys.data.vocabularies import BoundedVocabularies, UnknownIds


def assign_to_owners(content: BatchContent, group: dist.ProcessGroup) -> BatchContent:
    """Return content of items that this rank owns (`id mod W`) and any needs. A collective."""
    world_size = dist.get_world_size(group)
    owner = content.items % world_size
    order = owner.argsort(stable=True)  # [R], by owner: vectors arrive in this order
    request_counts = owner.bincount(minlength=world_size)
    incoming_counts = torch.empty_like(request_counts)
    dist.all_to_all_single(incoming_counts, request_counts, group=group)
    receive_counts, send_counts = request_counts.tolist(), incoming_counts.tolist()
    requested, sent = order.new_empty(sum(send_counts)), content.items[order]
    dist.all_to_all_single(requested, sent, send_counts, receive_counts, group=group)
    # Items [E], and the row among them of each requested item.
    owned, rows = requested.unique(return_inverse=True)
    arrival = torch.empty_like(order)
    arrival[order] = torch.arange(len(order))
    return replace(
        content,
        items=owned,
        target_index=arrival[content.target_index],
        history_index=arrival[content.history_index],
        negative_index=None if content.negative_index is None else arrival[content.negative_index],
        exchange=ItemExchange(rows, send_counts=send_counts, receive_counts=receive_counts),
    )


def with_negatives(content: BatchContent, negatives: Tensor) -> BatchContent:  # int64 [K]
    """Return the content of the items of a batch and of its drawn negatives.

    Negatives are encoded, as older vectors of the memory bank would differ visibly from targets.
    """
    items, index = torch.cat([content.items, negatives]).unique(return_inverse=True)
    rows, negative_index = index.split([len(content.items), len(negatives)])
    return replace(
        content,
        items=items,
        target_index=rows[content.target_index],
        history_index=rows[content.history_index],
        negative_index=negative_index,
    )


@torch.no_grad()
def shorten_histories(batch: Batch, bank: MemoryBank, top_k: int) -> Callable[[], Batch]:
    """Begin to read the bank; the result keeps `top_k` history items. A collective.

    These have the highest cosines to the target (MUSE, arXiv 2512.07216). Only the second call
    waits for a GPU, which has computed a step in between.
    """
    ids = torch.cat([batch.target.items, batch.history.items])
    route, _ = bank.routes(ids)()
    arrived = None
    if bank.device.type == "cuda":
        # The pipeline fetches its batches on another stream than that of the steps, which write.
        steps = torch.cuda.default_stream(bank.device)
        torch.cuda.current_stream(bank.device).wait_stream(steps)
    vectors = bank.lookup(ids, route)[0].contiguous().to("cpu", non_blocking=True)
    if bank.device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(bank.device))

    def finish() -> Batch:
        if arrived is not None:
            arrived.synchronize()
        return _shortened(batch, vectors, top_k)

    return finish


@torch.no_grad()
def _shortened(batch: Batch, vectors: Tensor, top_k: int) -> Batch:  # [B + U, D]
    vectors = F.normalize(vectors, dim=-1)
    target, items = vectors[: batch.batch_size], vectors[batch.batch_size :]
    history = batch.history.jagged()
    positions = history.highest(history.dot(target, items), top_k)
    index = batch.history.index[positions]
    is_used = index.bincount(minlength=len(items)) > 0
    lengths = batch.history.lengths.clamp(max=top_k)
    unique = batch.history.items[is_used]
    shortened = replace(
        batch.history,
        lengths=lengths,
        host_lengths=lengths.numpy(),
        values=batch.history.values[positions],
        longest=min(batch.history.longest, top_k),
        index=(is_used.cumsum(0) - 1)[index],
        items=unique,
    )
    features = batch.sequence_features
    features = with_ids(features, features.keys()[1], unique)  # the first is the target item
    return replace(batch, history=shortened, sequence_features=features)


def chooses_items(
    content: ContentSettings | None, has_bounded_items: bool = False, draws_negatives: bool = False
) -> bool:
    """Return whether this module selects items, so that the loader cannot read their content."""
    chooses = has_bounded_items or draws_negatives
    return content is not None and (chooses or content.dedup == "global")


def with_bank_rows(content: BatchContent, vocabulary: BoundedVocabulary) -> BatchContent:
    """Return content of raw items with their rows in the memory bank. A collective.

    Items that got their row in this step are encoded without gradient, wherever they occur.
    """
    ids, rows = vocabulary.admitted
    is_extra = ~np.isin(ids, content.items.numpy())
    item_rows = vocabulary.find(content.items)
    all_rows = torch.cat([item_rows, torch.from_numpy(rows[is_extra])])
    write_index = (all_rows >= 0).nonzero().squeeze(1)
    return replace(
        content,
        items=torch.cat([content.items, torch.from_numpy(ids[is_extra])]),
        bank_rows=all_rows[write_index],
        write_index=write_index,
        with_gradient=len(item_rows),
    )


@dataclass
class BatchPreparation:
    """Prepares batches for the pipeline."""

    content: ContentSettings | None
    store: ContentStore | None  # content of the items
    bank: MemoryBank | None  # of the items' vectors
    vocabularies: BoundedVocabularies  # map raw ids to rows
    group: dist.ProcessGroup | None = None  # the ranks that select items together
    negatives: NegativeSampler | None = None  # of a retrieval model with a softmax loss
    seed: int = 0  # of drawn negatives
    outputs: EncoderOutputs | None = None  # of trained encoders that run for a share of the items

    def __call__(
        self,
        batches: Iterator[Batch],
        unknown: UnknownIds,
        first_step: int,
        training: bool,
        with_content: bool = True,
    ) -> Iterator[Batch]:
        """Yield prepared batches for the pipeline, as many on each rank. A collective.

        `unknown` counts ids that have no row. In training, bounded vocabularies admit ids and items
        are sampled. `with_content` is False if an `ItemVectorCache` supplies the vectors.
        """
        waiting: Callable[[], Callable[[], Batch]] | None = None
        for step, batch in enumerate(batches, first_step):
            # Works one batch ahead, so that no rank waits here for the others.
            finish = waiting() if waiting is not None else None
            is_pinned = batch.target.items.is_pinned()  # before rows replace raw ids
            self.vocabularies.map_batch(batch, step, training)
            unknown.add(batch)
            waiting = self._begin(batch, step, training, with_content, is_pinned)
            if finish is not None:
                yield finish()
        if waiting is not None:
            yield waiting()()

    def _begin(
        self, batch: Batch, step: int, training: bool, with_content: bool, is_pinned: bool
    ) -> Callable[[], Callable[[], Batch]]:
        """Begin a batch; call the result, then its result, to end. All calls are collectives."""
        search: Callable[[], Batch] | None = None
        top_k = 0 if self.content is None else self.content.history.top_k
        if top_k and len(batch.sequence_features.keys()) > 1:
            assert self.bank is not None
            search = shorten_histories(batch, self.bank, top_k)

        def prepare() -> Callable[[], Batch]:
            prepared = batch if search is None else search()
            if self.negatives is not None:
                draw = self.seed, step, dist.get_rank(self.group)
                prepared = self.negatives(prepared, draw, training)
            prepared = self._with_items(prepared, step, training, with_content)
            is_new = prepared is not batch or bool(self.vocabularies.by_table)
            return self._with_routes(prepared, step, training, is_new, is_pinned)

        if search is not None and self.bank is not None and not is_host(self.bank.device):
            return prepare
        finish = prepare()
        return lambda: finish

    def _with_items(self, batch: Batch, step: int, training: bool, with_content: bool) -> Batch:
        items, negatives = self.vocabularies.items, batch.negatives
        is_chosen = chooses_items(self.content, items is not None, negatives is not None)
        if self.content is None or not is_chosen:
            return batch
        assert self.store is not None
        content = batch.content
        if negatives is not None:
            content = with_negatives(content, negatives.items)
        if self.content.dedup == "global":
            assert self.group is not None
            content = assign_to_owners(content, self.group)
        if training and items is not None and self.bank is not None:
            content = with_bank_rows(content, items)
        if with_content:
            content = replace(content, inputs=self.store.gather(content.items.numpy()))
        return replace(batch, content=content)

    def _with_routes(
        self, prepared: Batch, step: int, training: bool, is_new: bool, is_pinned: bool
    ) -> Callable[[], Batch]:
        routes: Callable[[], Routes] | None = None
        encoded: Callable[[], EncodedItems] | None = None
        if self.bank is not None:
            writes = prepared.content.bank_write_rows if training else None
            routes = self.bank.routes(prepared.history.items, writes)
        if training and self.outputs is not None:
            encoded = self.outputs.choose(prepared.content.items, step)
        scaled_rows = self._scaled_weights(prepared.rows) if training else None

        def finish() -> Batch:
            read, write = routes() if routes is not None else (None, None)
            ready = prepared if scaled_rows is None else replace(prepared, rows=scaled_rows())
            picked = encoded() if encoded is not None else None
            if read is not None or write is not None or picked is not None:
                content = replace(ready.content, bank_reads=read, bank_writes=write, encoded=picked)
                ready = replace(ready, content=content)
            # The loader pins before this; unpinned new tensors would be copied synchronously.
            return ready.pin_memory() if is_pinned and (is_new or ready is not prepared) else ready

        return finish

    def _scaled_weights(self, rows: Rows) -> Callable[[], Rows] | None:
        """Return a function that divides weights by their mean over all ranks. A collective."""
        if rows.weights is None and rows.label_weights is None:
            return None
        columns = [rows.loss_weights.unsqueeze(1), rows.label_loss_weights]
        weights = torch.cat(columns, dim=1).double()  # [B, 1 + C]
        totals = weights.sum(dim=0)
        work = dist.all_reduce(totals, group=self.group, async_op=True)
        num_rows = len(weights) * dist.get_world_size(self.group)

        def scaled() -> Rows:
            if work is not None:
                work.wait()
            means = totals / num_rows
            divided = (weights / means.where(means > 0, torch.inf)).float()
            label_weights = None if rows.label_weights is None else divided[:, 1:].contiguous()
            return replace(rows, weights=divided[:, 0].contiguous(), label_weights=label_weights)

        return scaled
