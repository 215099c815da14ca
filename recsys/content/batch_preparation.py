"""Prepares batches between the loader and the pipeline, in the training process.

It maps raw ids of bounded vocabularies to rows, shortens long histories by search, selects the
items that this rank encodes, and scales the rows' weights. All ranks prepare the same number of
batches together, since most steps need data of the other ranks or of the memory bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from embeddings import MemoryBank
from embeddings.memory_bank.routes import Routes
from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.config import Config, ContentSettings
from recsys.content.history_search import shorten_histories
from recsys.content.item_exchange import assign_to_owners
from recsys.content.item_sampling import sample_items
from recsys.data.batch import Batch
from recsys.data.items.content_store import ContentStore
from recsys.data.negatives import NegativeSampler
from recsys.data.vocabularies import BoundedVocabularies, UnknownIds


def chooses_items(content: ContentSettings | None, has_bounded_items: bool = False) -> bool:
    """Return whether this module selects items, so that the loader cannot read their content."""
    return content is not None and (
        content.dedup == "global" or content.sampling.backward < 1 or has_bounded_items
    )


def with_bank_rows(batch: Batch, vocabulary: BoundedVocabulary) -> Batch:
    """Return a batch of raw items with their rows in the memory bank. A collective.

    Items that got their row in this step are encoded in it, too, wherever they occur, without
    gradient: the bank knows nothing of them yet, and histories read it.
    """
    ids, rows = vocabulary.admitted
    is_further = ~np.isin(ids, batch.content_items.numpy())
    found = vocabulary.find(batch.content_items)
    return replace(
        batch,
        content_items=torch.cat([batch.content_items, torch.from_numpy(ids[is_further])]),
        bank_rows=torch.cat([found, torch.from_numpy(rows[is_further])]),
        with_gradient=len(found),
    )


@dataclass
class BatchPreparation:
    """Prepares batches for the pipeline.

    Args:
        config: configuration of the run.
        store: content of the items, if any.
        bank: memory bank of the items' vectors, if any.
        vocabularies: bounded vocabularies, which map raw ids to rows.
        group: the ranks that select items together.
        negatives: sampler for a retrieval model with a softmax loss.
    """

    config: Config
    store: ContentStore | None
    bank: MemoryBank | None
    vocabularies: BoundedVocabularies
    group: dist.ProcessGroup | None = None
    negatives: NegativeSampler | None = None

    def __post_init__(self) -> None:
        """Keep the content settings; None for the ID-only twin."""
        content = self.config.content
        self.content = content if isinstance(content, ContentSettings) else None

    def __call__(
        self,
        batches: Iterator[Batch],
        unknown: UnknownIds,
        first_step: int,
        training: bool,
        with_content: bool = True,
    ) -> Iterator[Batch]:
        """Yield prepared batches for the pipeline. A collective.

        Args:
            batches: the same number on all ranks.
            unknown: counts ids that have no row of their own.
            first_step: the training step of the first batch.
            training: whether bounded vocabularies admit ids and items are sampled.
            with_content: False if the items that this module selects get their vectors later, from
                `ScoredItems`.
        """
        waiting: Callable[[], Batch] | None = None
        for step, batch in enumerate(batches, first_step):
            self.vocabularies.map_batch(batch, step, training)
            unknown.add(batch)
            prepared = self._with_histories(batch)
            prepared = self._with_items(prepared, step, training, with_content)
            prepared = self._with_negatives(prepared, step, training)
            finish = self._with_routes(batch, prepared, training)
            # Works one batch ahead, so that no rank waits here for the others.
            if waiting is not None:
                yield waiting()
            waiting = finish
        if waiting is not None:
            yield waiting()

    def _with_histories(self, batch: Batch) -> Batch:
        has_history = len(batch.sequence_features.keys()) > 1
        if self.content is None or not self.content.history.top_k or not has_history:
            return batch
        assert self.bank is not None
        return shorten_histories(
            batch, self.bank, self.content.history.top_k, self.config.embedding.index_dedup
        )

    def _with_items(self, batch: Batch, step: int, training: bool, with_content: bool) -> Batch:
        items = self.vocabularies.items
        if self.content is None or not chooses_items(self.content, items is not None):
            return batch
        assert self.store is not None
        if self.content.dedup == "global":
            assert self.group is not None
            batch = assign_to_owners(batch, self.group)
        sampling = self.content.sampling
        if training and sampling.backward < 1:
            batch = sample_items(batch, sampling, self._draw(step))
        if training and items is not None and self.bank is not None:
            batch = with_bank_rows(batch, items)
        if not with_content:
            return batch
        return replace(batch, content=self.store.gather(batch.content_items.numpy()))

    def _with_negatives(self, batch: Batch, step: int, training: bool) -> Batch:
        if self.negatives is None:
            return batch
        return self.negatives(batch, self._draw(step), training)

    def _draw(self, step: int) -> tuple[int, int, int]:
        """Return the seed of a step's random choices on this rank."""
        return (self.config.seed, step, dist.get_rank(self.group))

    def _with_routes(self, batch: Batch, prepared: Batch, training: bool) -> Callable[[], Batch]:
        """Exchange the routes of bank rows ahead, so that the step sends vectors only."""
        routes: Callable[[], Routes] | None = None
        if self.bank is not None:
            writes = prepared.bank_write_rows if training else None
            routes = self.bank.routes(prepared.read_items, writes)
        with_weights = self._weights(prepared) if training else None

        def finish() -> Batch:
            read, write = routes() if routes is not None else (None, None)
            ready = prepared if with_weights is None else with_weights()
            if read is not None or write is not None:
                ready = replace(ready, bank_reads=read, bank_writes=write)
            # The loader pins before this; unpinned new tensors would be copied synchronously.
            is_new = ready is not batch and batch.target_items.is_pinned()
            return ready.pin_memory() if is_new else ready

        return finish

    def _weights(self, batch: Batch) -> Callable[[], Batch] | None:
        """Sum the weights of all ranks' rows, by which the function returned scales. A collective.

        Every loss is the mean over the rows of a rank, and gradients are averaged over ranks: with
        weights of mean 1 both together are the weighted mean over the rows of all ranks.
        """
        if batch.weights is None and batch.label_weights is None:
            return None
        columns = torch.cat([batch.row_weights.unsqueeze(1), batch.loss_weights], dim=1).double()
        totals = columns.sum(dim=0)
        work = dist.all_reduce(totals, group=self.group, async_op=True)
        num_rows = batch.batch_size * dist.get_world_size(self.group)

        def scaled() -> Batch:
            if work is not None:
                work.wait()
            means = totals / num_rows
            weights = (columns / means.where(means > 0, torch.inf)).float()
            of_labels = None if batch.label_weights is None else weights[:, 1:].contiguous()
            return replace(batch, weights=weights[:, 0].contiguous(), label_weights=of_labels)

        return scaled
