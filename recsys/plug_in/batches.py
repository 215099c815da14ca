"""Batches of a user's own pipeline -> batches with content, made from the ids in sparse features.

Shapes: B batch, N ids of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.content.batch_preparation import BatchPreparation, chooses_items
from recsys.content.branch import ContentBranch
from recsys.content.item_vectors import encode_into_bank
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import in_order, threads
from recsys.data.items.content_store import ContentStore
from recsys.data.parquet.columns import ListColumns, RowColumns
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.vocabularies import BoundedVocabularies, UnknownIds
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.plug_in.settings import PlugInSettings

PREFETCHED_BATCHES = 2  # batches that are built while one is in use


class ContentBatches(Iterable[Batch]):
    """Batches of `source` with content; iterable as often as `source`.

    All ranks iterate together, stop at the smallest number of batches, and raise an error of any
    rank. The first pass fills the memory bank. `require_ready` is called before a pass in training.
    """

    def __init__(
        self, source: Iterable[TorchRecBatch], items: ItemContent, require_ready: Callable[[], None]
    ) -> None:
        self.source, self.items, self.require_ready = source, items, require_ready
        self.schema = items.store.items.schema

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        """Begin a pass. A collective, as is each batch of it."""
        items, branch = self.items, self.items.branch
        if branch.training:
            self.require_ready()
        has_history = self.schema.history is not None
        if has_history and branch.bank is not None and branch.bank.coverage() == 0:
            encode_into_bank(branch, items.store, items.ranks)
        unknown = UnknownIds(self.schema)
        return items.preparation(self._synchronized(), unknown, branch.step, branch.training)

    def _synchronized(self) -> Iterator[Batch]:
        """Yield batches, which a thread builds ahead, until any rank has no more. A collective."""
        with threads(1, "content") as submit:
            jobs = (partial(self._with_items, batch) for batch in self.source)
            with closing(in_order(jobs, submit, PREFETCHED_BATCHES)) as source:
                yield from Lockstep(self.items.ranks).batches(source)

    def _with_items(self, batch: TorchRecBatch) -> Batch:
        """Return a batch with the items of its features, on the host; pinned if it was."""
        target, lengths = self._feature(batch.sparse_features, self.schema.target_item)
        if not (lengths == 1).all():
            row = int((lengths != 1).argmax())
            raise ValueError(
                f"sparse feature '{self.schema.target_item}' has {lengths[row]} ids in row {row} "
                "of a batch; the ranked item needs exactly one in each row"
            )
        numbers = {self.schema.target_item: target, ROW_POSITION: np.arange(len(target))}
        lists: tuple[ListColumns, ...] = ()
        if self.schema.history is not None:
            history, lengths = self._feature(batch.sparse_features, self.schema.history)
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            lists = (ListColumns(offsets, {self.schema.history: history}),)
        built = self.items.build(RowColumns(numbers, lists))
        if batch.dense_features.is_pinned():
            built = built.pin_memory()
        names = ("dense_features", "sparse_features", "labels")
        return replace(built, **{name: getattr(batch, name) for name in names})

    def _feature(self, features: KeyedJaggedTensor, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a feature [N] and the number of ids in each row [B]."""
        names = features.keys()
        if name not in names:
            raise ValueError(f"batches have no sparse feature '{name}'; they have {names}")
        feature = features[name]
        ids = feature.values().cpu().numpy().astype(np.int64)
        outside = (ids < 0) | (ids >= self.schema.num_items)
        if outside.any():
            raise ValueError(
                f"sparse feature '{name}': id {ids[outside][0]} is outside [0, "
                f"{self.schema.num_items}), the rows of the table of '{self.schema.target_item}'; "
                "map ids of items to rows of that table before they enter a batch"
            )
        return ids, feature.lengths().cpu().numpy()


class ItemContent:
    """Content of items for any model: the branch that encodes it, and batches that carry it.

    Example::

        from recsys.plug_in import ItemContent, build_item_content

        content: ItemContent = build_item_content("content.yaml", 30, device)
        batch = next(iter(content.batches(loader)))
        target = content.branch(batch).target  # [B, D]
        assert target.shape == (len(batch.labels), 16)
    """

    def __init__(
        self, branch: ContentBranch, settings: PlugInSettings, store: ContentStore, ranks: Ranks
    ) -> None:
        self.branch, self.store, self.ranks = branch, store, ranks
        content, schema, group = settings.content, store.items.schema, ranks.group
        batch_store = None if chooses_items(content) else store
        history = branch.encodes_history
        self.build = BatchBuilder(schema, [], batch_store, history, with_labels=False)
        self.preparation = BatchPreparation(
            content,
            store,
            branch.bank,
            BoundedVocabularies(schema, [], group),
            group,
            seed=settings.seed,
            outputs=branch.outputs,
        )

    def batches(
        self, source: Iterable[TorchRecBatch], require_ready: Callable[[], None] = lambda: None
    ) -> ContentBatches:
        """Return the batches of a dataset or data loader with content, for use in its place.

        Call it after all other wrappers of the loader. Iterate after the model is sharded; each
        pass is a collective. Batches are `torchrec.datasets.utils.Batch`, or have its attributes.

        Raises:
            ValueError: on every rank, during iteration: a feature is missing, or an id has no row.
        """
        return ContentBatches(source, self, require_ready)
