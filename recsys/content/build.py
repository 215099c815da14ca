"""Builds the parts of the content branch: prepared items, encoders and the memory bank."""

from __future__ import annotations

import logging

from embeddings import MemoryBank, build_memory_bank
from recsys.config import Config, ContentSettings, content_settings
from recsys.content.cache.fill import cache_frozen_outputs
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.build import encoder_of
from recsys.data.filesystem import Location, home_expanded
from recsys.data.items.content_store import ContentStore, ItemTable, default_cache
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks

logger = logging.getLogger(__name__)


def build_content_store(
    config: Config, content: ContentSettings, root: Location, schema: Schema, ranks: Ranks
) -> tuple[ContentStore, dict[str, Encoder]]:
    """Prepare the items once per machine and build the encoders. A collective.

    Texts are tokenised, images decoded, and frozen layers run, unless a cache has their outputs.

    Raises:
        ValueError: on every rank, when one cannot use its items or encoders.
    """
    with ranks.raise_on_all_ranks():
        cache = home_expanded(config.cache) if config.cache else default_cache()
        items = ItemTable(root, schema, config.on_bad_row)
        store = ContentStore(items, content.modalities, cache)
    encoders: dict[str, Encoder] = {}
    for name, modality in content.modalities.items():
        kind = store.kinds[name]
        with ranks.raise_on_all_ranks():
            if ranks.is_first_of_machine:
                store.build(name)
        with ranks.raise_on_all_ranks():
            store.build(name)
            encoders[name] = encoder = encoder_of(kind, store.arrays[name].values.shape[1:])
        for note in [*kind.notes, *encoder.notes]:
            logger.info(note)
        if encoder.caches and modality.cache_frozen_layers:
            cache_frozen_outputs(store, name, encoder, ranks)
    return store, encoders


def build_content(
    config: Config, root: Location, schema: Schema, ranks: Ranks
) -> tuple[ContentStore | None, dict[str, Encoder], MemoryBank | None]:
    """Return items, encoders and memory bank; empty for the ID-only twin. A collective."""
    content = content_settings(config)
    if content is None:
        return None, {}, None
    store, encoders = build_content_store(config, content, root, schema, ranks)
    if content.history.mode == "full":
        return store, encoders, None
    sizes = schema.num_items, content.vector_dim
    bank = build_memory_bank(*sizes, ranks.device, ranks.group, content.history.bank)
    return store, encoders, bank
