"""Builds the content of a DLRM from settings, and adds it to the DLRM.

Shapes: D dimension.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.models.dlrm import DLRM

from embeddings import MemoryBank, build_memory_bank
from recsys.content.batch_preparation import BatchPreparation, chooses_items
from recsys.content.branch import ContentBranch
from recsys.content.build import build_content_store
from recsys.data.batch_builder import BatchBuilder
from recsys.data.filesystem import Location
from recsys.data.items.content_store import ContentStore
from recsys.data.schema import Schema
from recsys.data.vocabularies import BoundedVocabularies
from recsys.distributed.ranks import Ranks
from recsys.plug_in.batches import ContentBatches, ItemsOfBatch
from recsys.plug_in.model import DLRMWithContent
from recsys.plug_in.settings import PlugInSettings, check, load_plug_in_settings


class DLRMOfItems(DLRMWithContent):
    """A `DLRMWithContent` with its items, so that it can make its batches. See `add_content`."""

    def __init__(
        self,
        dlrm: DLRM,
        branch: ContentBranch,
        settings: PlugInSettings,
        store: ContentStore,
        ranks: Ranks,
    ) -> None:
        """Build the model, and the parts that add items to batches."""
        has_history = settings.history is not None
        super().__init__(
            dlrm, branch, settings.content, settings.item, has_history, settings.contrastive
        )
        self.store, self.ranks = store, ranks
        schema, gathers_later = store.items.schema, chooses_items(settings.content)
        self._items = ItemsOfBatch(
            schema,
            BatchBuilder(
                schema,
                pooled_features=[],
                store=None if gathers_later else store,
                encode_history=branch.encodes_history,
                with_labels=False,
            ),
        )
        vocabularies = BoundedVocabularies(schema, [], ranks.group)
        self._preparation = BatchPreparation(
            settings.config, store, branch.bank, vocabularies, ranks.group
        )

    def batches(self, source: Iterable[TorchRecBatch]) -> ContentBatches:
        """Return the batches of a dataset or data loader with content, for use in its place.

        Iterate over them once the model is sharded. Each pass is a collective.

        Raises:
            ValueError: on every rank, during iteration: a batch lacks a feature, or an id is not a
                row of the item table.
        """
        branch = self.content.branch
        return ContentBatches(source, self._items, self._preparation, branch, self.ranks)


def add_content(
    dlrm: DLRM, settings: PlugInSettings | Path | str, device: torch.device
) -> DLRMOfItems:
    """Build a DLRM with content of its items in its interaction. A collective.

    Tokenises, decodes and encodes the frozen part of the items' content, once per machine. The
    state of the caller's random number generator does not change.

    Args:
        dlrm: DLRM, DLRM_DCN or DLRM_Projection, not yet sharded.
        settings: or the YAML file with them.
        device: of this rank.

    Raises:
        ValueError: if settings, items or DLRM are invalid on any rank; raised on all.

    Example::

        import torch
        from recsys.plug_in import DLRMWithContentTrain, add_content

        device = torch.device("cuda", local_rank)
        model = add_content(DLRM(tables, 13, [512, 128], [512, 1], device), "content.yaml", device)
        train_model = DLRMWithContentTrain(model)
    """
    ranks = _ranks(device)
    with ranks.raise_on_all_ranks():
        if not isinstance(settings, PlugInSettings):
            settings = load_plug_in_settings(settings)
        check(settings)
        schema = settings.schema(_num_items(dlrm, settings.item))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # the same on all ranks: initial weights agree
        return _build(dlrm, settings, schema, ranks)


def _build(dlrm: DLRM, settings: PlugInSettings, schema: Schema, ranks: Ranks) -> DLRMOfItems:
    """Build the result of `add_content`. A collective."""
    content, root = settings.content, Location.of(settings.data)
    store, encoders = build_content_store(settings.config, content, root, schema, ranks)
    with ranks.raise_on_all_ranks():
        bank: MemoryBank | None = None
        if content.history.mode != "full":
            sizes = schema.num_items, content.vector_dim
            bank = build_memory_bank(*sizes, ranks.device, ranks.group, content.history.bank)
        branch = ContentBranch(encoders, content, bank, ranks.group)
        return DLRMOfItems(dlrm, branch, settings, store, ranks)


def _num_items(dlrm: DLRM, item: str) -> int:
    """Return the number of rows of the table that the ranked item is looked up in."""
    tables = dlrm.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    for table in tables:
        if item in table.feature_names:
            return table.num_embeddings
    names = [name for table in tables for name in table.feature_names]
    raise ValueError(f"item: the DLRM has no sparse feature '{item}'; it has {names}")


def _ranks(device: torch.device) -> Ranks:
    """Return the ranks of the caller's job, with a process group of their own. A collective."""
    if not dist.is_initialized():
        raise ValueError(
            "no process group: call torch.distributed.init_process_group before add_content"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Ranks(
        rank,
        world_size,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        device,
        dist.new_group(backend=backend),
    )
