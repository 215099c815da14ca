"""Builds the content of a DLRM from settings, and adds it to the DLRM."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch
import torch.distributed as dist
from torchrec.models.dlrm import DLRM, DLRMTrain

from recsys.content.branch import ContentBranch
from recsys.content.build import build_content
from recsys.content.item_vectors import init_projections
from recsys.distributed.ranks import Ranks
from recsys.plug_in.batches import ItemContent
from recsys.plug_in.model import (
    DLRMWithContent,
    DLRMWithContentTrain,
    require_dlrm,
    require_plain_loss,
)
from recsys.plug_in.settings import PlugInSettings, check, load_plug_in_settings
from recsys.storage.location import Location


@overload
def add_content(
    model: DLRMTrain, settings: PlugInSettings | Path | str, device: torch.device
) -> DLRMWithContentTrain: ...


@overload
def add_content(  # type: ignore[overload-cannot-match]
    model: DLRM, settings: PlugInSettings | Path | str, device: torch.device
) -> DLRMWithContent: ...


def add_content(
    model: DLRM | DLRMTrain, settings: PlugInSettings | Path | str, device: torch.device
) -> DLRMWithContent | DLRMWithContentTrain:
    """Build a DLRM with content of its items in its interaction. A collective.

    `model` is a DLRM, DLRM_DCN or DLRM_Projection, not yet sharded, or the DLRMTrain of one. The
    state of the caller's random number generator does not change.

    Raises:
        ValueError: on all ranks: settings, items or model are invalid on any rank.

    Example::

        import torch
        from torchrec.models.dlrm import DLRMTrain
        from torchrec.optim.keyed import KeyedOptimizerWrapper

        from recsys.plug_in import add_content

        train_model = add_content(DLRMTrain(dlrm), "content.yaml", device)
        dense = KeyedOptimizerWrapper(dict(train_model.named_parameters()), torch.optim.Adagrad)
        optimizer = train_model.optimizer(dense)  # of the sharded model, if you shard it
        loss, _ = train_model(next(iter(train_model.batches(loader))))
    """
    ranks = _ranks(device)
    dlrm = model.model if isinstance(model, DLRMTrain) else model
    with ranks.raise_on_all_ranks():
        require_dlrm(dlrm)
        if isinstance(model, DLRMTrain):
            require_plain_loss(model)
        settings = _checked(settings)
        num_items = _num_items(dlrm, settings.item)
    with _seeded(settings):
        result = DLRMWithContent(dlrm, _build(settings, num_items, ranks), settings)
        if not isinstance(model, DLRMTrain):
            return result
        return DLRMWithContentTrain(result, settings.optimizer, model.loss_fn)


def build_item_content(
    settings: PlugInSettings | Path | str, num_items: int, device: torch.device
) -> ItemContent:
    """Build the content of items for a model of any kind. A collective.

    `num_items` is the number of rows of the model's item table; item ids are these rows.
    `contrastive` and `optimizer` of the settings are ignored.

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
    store, encoders, bank = build_content(
        content, root, schema, ranks, settings.cache, settings.on_bad_row
    )
    assert store is not None
    with ranks.raise_on_all_ranks():
        branch = ContentBranch(encoders, content, bank, ranks.group).to(ranks.device)
        items = ItemContent(branch, settings, store, ranks)
    init_projections(branch, store, ranks)
    branch.train()
    return items


def _num_items(dlrm: DLRM, item: str) -> int:
    tables = dlrm.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    for table in tables:
        if item in table.feature_names:
            return int(table.num_embeddings)
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
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    group = dist.new_group(backend=backend)
    return Ranks(rank, world_size, local_rank, local_world_size, device, group)
