"""Builds the content of a DLRM from settings, and adds it to the DLRM.

Shapes: D dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from embeddings import MemoryBank, build_memory_bank
from recsys.content.batch_preparation import BatchPreparation, chooses_items
from recsys.content.branch import ContentBranch
from recsys.content.build import build_content_store
from recsys.content.projection_start import start_projections
from recsys.data.batch_builder import BatchBuilder
from recsys.data.filesystem import Location
from recsys.data.items.content_store import ContentStore
from recsys.data.vocabularies import BoundedVocabularies
from recsys.distributed.ranks import Ranks
from recsys.optimizer.dense import DenseGroup, parameter_groups
from recsys.plug_in.batches import ContentBatches, ItemsOfBatch
from recsys.plug_in.model import DLRMWithContent, DLRMWithContentTrain, new_prefixes, require_dlrm
from recsys.plug_in.settings import ContentRates, PlugInSettings, check, load_plug_in_settings


def with_content_optimizer(
    optimizer: KeyedOptimizer, model: nn.Module, rates: ContentRates
) -> CombinedOptimizer:
    """Take the new parameters out of the user's optimizer, and combine it with an AdamW for them.

    Content has its own learning rates: a rate that suits a DLRM, such as 15.0 for plain SGD in
    TorchRec's example, destroys an encoder in one step.
    """
    if not isinstance(optimizer, KeyedOptimizer):
        raise ValueError(
            f"the optimizer is a {type(optimizer).__name__}; give a torchrec KeyedOptimizer, such "
            "as CombinedOptimizer([model.fused_optimizer, KeyedOptimizerWrapper(...)])"
        )
    prefixes = new_prefixes(model)
    new = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}
    _take_out(optimizer, {id(parameter) for parameter in new.values()})
    trained = {name: parameter for name, parameter in new.items() if parameter.requires_grad}
    encoders = [f"{prefix}branch.encoders." for prefix in prefixes]
    decay = rates.weight_decay
    groups = parameter_groups(
        model,
        trained,
        [
            DenseGroup("encoders", encoders, rates.encoder_learning_rate, decay),
            DenseGroup("content", [""], rates.learning_rate, decay),
        ],
    )
    ordered = {name: trained[name] for group in groups for name in group.pop("names")}
    adamw = torch.optim.AdamW(groups, fused=True)
    return CombinedOptimizer([optimizer, KeyedOptimizerWrapper(ordered, lambda _: adamw)])


def _take_out(optimizer: KeyedOptimizer, parameters: set[int]) -> None:
    """Remove parameters, given by their ids, from an optimizer and those inside it."""
    if isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            _take_out(part, parameters)
        return
    named: Any = optimizer.params
    for name in [name for name, parameter in named.items() if id(parameter) in parameters]:
        optimizer.state.pop(named.pop(name), None)  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        kept = [parameter for parameter in group["params"] if id(parameter) not in parameters]
        group["params"][:] = kept


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
        config = settings.config
        self._preparation = BatchPreparation(
            settings.content,
            store,
            branch.bank,
            vocabularies,
            ranks.group,
            index_dedup=config.embedding.index_dedup,
            seed=config.seed,
        )

    def batches(
        self, source: Iterable[TorchRecBatch], require_ready: Callable[[], None] = lambda: None
    ) -> ContentBatches:
        """Return the batches of a dataset or data loader with content, for use in its place.

        Call it after all other wrappers of the loader. Iterate after the model is sharded; each
        pass is a collective. Batches are `torchrec.datasets.utils.Batch`, or have its attributes.

        Raises:
            ValueError: on every rank, during iteration: a batch lacks a feature, or an id is not a
                row of the item table.
        """
        parts = self._items, self._preparation, self.branch, self.ranks
        return ContentBatches(source, *parts, require_ready)


class DLRMOfItems(DLRMWithContent):
    """A `DLRMWithContent` with its items, so that it can make its batches. See `add_content`.

    Example::

        from recsys.plug_in import DLRMOfItems, add_content

        model: DLRMOfItems = add_content(dlrm, "content.yaml", device)
        logits = model(next(iter(model.batches(loader))))  # [B, 1]
    """

    def __init__(self, dlrm: DLRM, items: ItemContent, settings: PlugInSettings) -> None:
        has_history, contrastive = settings.history is not None, settings.contrastive
        super().__init__(
            dlrm, items.branch, settings.content, settings.item, has_history, contrastive
        )
        self.items = items
        self.batches = items.batches


class DLRMOfItemsTrain(DLRMWithContentTrain):
    """A `DLRMWithContentTrain` with its items and its optimizer. See `add_content`.

    Example::

        from torchrec.models.dlrm import DLRMTrain

        from recsys.plug_in import DLRMOfItemsTrain, add_content

        train_model: DLRMOfItemsTrain = add_content(DLRMTrain(dlrm), "content.yaml", device)
        batch = next(iter(train_model.eval().batches(loader)))
        loss, (_, logits, labels) = train_model(batch)  # logits and labels [B]
    """

    def __init__(self, model: DLRMOfItems, rates: ContentRates | None) -> None:
        super().__init__(model)
        self.items, self.rates, self._has_optimizer = model.items, rates, rates is None

    def optimizer(self, optimizer: KeyedOptimizer) -> KeyedOptimizer:
        """Return the user's optimizer without the new parameters, and an AdamW of these."""
        if self.rates is None:
            return optimizer
        combined = with_content_optimizer(optimizer, self, self.rates)
        self._has_optimizer = True
        return combined

    def batches(self, source: Iterable[TorchRecBatch]) -> ContentBatches:
        """Return the batches of a dataset or data loader with content; see `ItemContent`."""
        return self.items.batches(source, self._require_optimizer)

    def _require_optimizer(self) -> None:
        if not self._has_optimizer:
            raise ValueError(
                "the new parameters have no optimizer of their own: add `optimizer = "
                "train_model.optimizer(optimizer)` after yours, or set `optimizer: null` in the "
                "settings to train them with yours"
            )


@overload
def add_content(
    model: DLRMTrain, settings: PlugInSettings | Path | str, device: torch.device
) -> DLRMOfItemsTrain: ...


@overload
def add_content(  # type: ignore[overload-cannot-match]
    model: DLRM, settings: PlugInSettings | Path | str, device: torch.device
) -> DLRMOfItems: ...


def add_content(
    model: DLRM | DLRMTrain, settings: PlugInSettings | Path | str, device: torch.device
) -> DLRMOfItems | DLRMOfItemsTrain:
    """Build a DLRM with content of its items in its interaction. A collective.

    Tokenises, decodes and encodes the frozen part of the items' content, once per machine, and
    initialises the projections as training does. The state of the caller's random number generator
    does not change.

    Args:
        model: DLRM, DLRM_DCN or DLRM_Projection, not yet sharded, or the DLRMTrain of one.
        settings: the settings, or a YAML file with them.
        device: device of this rank.

    Raises:
        ValueError: on all ranks: settings, items or model are invalid on any rank.

    Example::

        import torch
        from torchrec.models.dlrm import DLRMTrain
        from torchrec.optim.keyed import KeyedOptimizerWrapper

        from recsys.plug_in import add_content

        train_model = add_content(DLRMTrain(dlrm), "content.yaml", device)
        own = KeyedOptimizerWrapper(dict(train_model.named_parameters()), torch.optim.Adagrad)
        optimizer = train_model.optimizer(own)  # of the sharded model, if you shard it
        loss, _ = train_model(next(iter(train_model.batches(loader))))
    """
    ranks = _ranks(device)
    dlrm = model.model if isinstance(model, DLRMTrain) else model
    with ranks.raise_on_all_ranks():
        require_dlrm(dlrm)
        settings = _checked(settings)
        num_items = _num_items(dlrm, settings.item)
    with _seeded(settings):
        result = DLRMOfItems(dlrm, _build(settings, num_items, ranks), settings)
        if isinstance(model, DLRMTrain):
            return DLRMOfItemsTrain(result, settings.optimizer)
        return result


def build_item_content(
    settings: PlugInSettings | Path | str, num_items: int, device: torch.device
) -> ItemContent:
    """Build the content of items for a model of any kind. A collective.

    Args:
        settings: the settings, or a YAML file with them; `contrastive` and `optimizer` are ignored.
        num_items: rows of the model's item table; item ids are these rows.
        device: device of this rank.

    Raises:
        ValueError: on all ranks: settings or items are invalid on any rank.

    Example::

        from recsys.plug_in import build_item_content

        content = build_item_content("content.yaml", num_items=30, device=device)
        for batch in content.batches(loader):
            target = content.branch(batch).target  # [B, D], for a model of your own
    """
    ranks = _ranks(device)
    with ranks.raise_on_all_ranks():
        settings = _checked(settings)
    with _seeded(settings):
        return _build(settings, num_items, ranks)


def _checked(settings: PlugInSettings | Path | str) -> PlugInSettings:
    """Return the settings, read and checked."""
    if not isinstance(settings, PlugInSettings):
        settings = load_plug_in_settings(settings)
    check(settings)
    return settings


@contextmanager
def _seeded(settings: PlugInSettings) -> Iterator[None]:
    """Draw the same random numbers on all ranks, so that initial weights agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        yield


def _build(settings: PlugInSettings, num_items: int, ranks: Ranks) -> ItemContent:
    """Build content and initialise its projections. A collective."""
    content, root, schema = settings.content, Location.of(settings.data), settings.schema(num_items)
    store, encoders = build_content_store(
        content, root, schema, ranks, settings.config.cache, settings.config.on_bad_row
    )
    with ranks.raise_on_all_ranks():
        bank: MemoryBank | None = None
        if content.history.mode != "full":
            sizes = schema.num_items, content.vector_dim
            bank = build_memory_bank(*sizes, ranks.device, ranks.group, content.history.bank)
        branch = ContentBranch(encoders, content, bank, ranks.group).to(ranks.device)
        items = ItemContent(branch, settings, store, ranks)
    start_projections(branch, store, ranks)
    branch.train()
    return items


def _num_items(dlrm: DLRM, item: str) -> int:
    """Return the number of rows of the ranked item's table."""
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
