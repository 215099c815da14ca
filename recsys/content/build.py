"""Builds what the content branch needs: prepared items, encoders and the memory bank."""

from __future__ import annotations

from pathlib import Path

from embeddings import (
    MemoryBank,
    build_memory_bank,
)
from recsys.config import Config, ContentSettings, content_settings
from recsys.content.cache.fill import cache_frozen_outputs
from recsys.content.encoders.build import Encoder, build_encoder
from recsys.content.encoders.preparation import load_preparation
from recsys.data.filesystem import Location
from recsys.data.items.content_store import ContentStore, ItemTable, default_cache
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks


def build_content_store(
    config: Config, content: ContentSettings, root: Location, schema: Schema, ranks: Ranks
) -> tuple[ContentStore, dict[str, Encoder]]:
    """Tokenises, decodes and encodes what is frozen, once per machine; the encoders beside it."""
    cache = Path(config.cache).expanduser() if config.cache else default_cache()
    with ranks.raise_on_all_ranks():
        items = ItemTable(root, schema, config.on_bad_row)
        store = ContentStore(items, content.modalities, cache)
    encoders: dict[str, Encoder] = {}
    for name, modality in content.modalities.items():
        with ranks.raise_on_all_ranks():
            read = load_preparation(modality, f"content.modalities.{name}")
            if ranks.is_first_of_machine:
                store.build(name, read.tokenizer, read.fills_texts, read.images)
        with ranks.raise_on_all_ranks():
            store.build(name, read.tokenizer, read.fills_texts, read.images)
            width = store.arrays[name].values.shape[-1] if modality.kind == "feature" else None
            encoders[name] = build_encoder(name, modality, width, read)
        for note in [*read.notes, *encoders[name].notes] if ranks.is_first else ():
            print(note, flush=True)
        if encoders[name].caches and modality.cache_frozen_layers:
            cache_frozen_outputs(store, name, encoders[name], ranks)
    return store, encoders


def build_content(
    config: Config, root: Location, schema: Schema, ranks: Ranks
) -> tuple[ContentStore | None, dict[str, Encoder], MemoryBank | None]:
    """Items, encoders and memory bank; nothing for the ID-only twin."""
    content = content_settings(config)
    if content is None:
        return None, {}, None
    store, encoders = build_content_store(config, content, root, schema, ranks)
    if content.history.mode == "full":
        return store, encoders, None
    sizes = schema.num_items, content.vector_dim
    bank = build_memory_bank(*sizes, ranks.device, ranks.group, content.history.bank)
    return store, encoders, bank
