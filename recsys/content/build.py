"""Builds the parts of the content branch; fills the caches of `recsys cache` without training."""

import logging
from typing import Literal

from embeddings import MemoryBank, build_memory_bank
from recsys.config import Config, ContentSettings, content_settings
from recsys.content.cache.fill import cache_frozen_outputs
from recsys.content.encoders.base import CacheReport, Encoder
from recsys.content.encoders.build import make_encoder
from recsys.content.kinds.feature import Feature
from recsys.data.items.content_store import ContentStore, default_cache
from recsys.data.items.item_table import ItemTable
from recsys.data.schema import Schema, load_schema
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.storage.files import home_expanded
from recsys.storage.location import Location

logger = logging.getLogger(__name__)


def build_content_store(
    content: ContentSettings,
    root: Location,
    schema: Schema,
    ranks: Ranks,
    cache: str | None = None,  # folder; None: the usual one
    on_bad_row: Literal["error", "skip"] = "error",
) -> tuple[ContentStore, dict[str, Encoder]]:
    """Prepare the items once per machine and build the encoders. A collective."""
    with ranks.raise_on_all_ranks():
        folder = home_expanded(cache) if cache else default_cache()
        store = ContentStore(ItemTable(root, schema, on_bad_row), content.modalities, folder)
    encoders: dict[str, Encoder] = {}
    for name, modality in content.modalities.items():
        kind = store.kinds[name]
        with ranks.raise_on_all_ranks():
            if ranks.is_first_of_machine:
                store.build(name)
        with ranks.raise_on_all_ranks():
            store.build(name)
            encoders[name] = encoder = make_encoder(kind, store.arrays[name].values.shape[1:])
        for note in [*kind.notes, *encoder.notes]:
            logger.info(note)
        if encoder.caches and modality.cache_frozen_layers:
            cache_frozen_outputs(store, name, encoder, ranks)
    return store, encoders


def build_content(
    content: ContentSettings | None,
    root: Location,
    schema: Schema,
    ranks: Ranks,
    cache: str | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> tuple[ContentStore | None, dict[str, Encoder], MemoryBank | None]:
    """Return items, encoders and memory bank; empty for the ID-only baseline. A collective."""
    if content is None:
        return None, {}, None
    store, encoders = build_content_store(content, root, schema, ranks, cache, on_bad_row)
    if content.history.mode == "full":
        return store, encoders, None
    bank = build_memory_bank(
        schema.num_items, content.vector_dim, ranks.device, ranks.group, content.history.bank
    )
    return store, encoders, bank


def fill_caches(config: Config, data: str, ranks: Ranks) -> dict[str, CacheReport | None]:
    """Fill missing caches, print a line per modality and return the reports. A collective."""
    content = content_settings(config.content)
    if content is None:
        raise ValueError(
            "content is none: there is nothing to cache; give a configuration with content"
        )
    with ranks.raise_on_all_ranks():
        root = Location.of(data)
        schema = load_schema(root)
    store, encoders = build_content_store(
        content, root, schema, ranks, config.cache, config.on_bad_row
    )
    reports = {name: encoder.cache_report for name, encoder in encoders.items()}
    if ranks.is_first:
        print_table("\n".join(_line(name, report, store) for name, report in reports.items()))
    return reports


def _line(name: str, report: CacheReport | None, store: ContentStore) -> str:
    kind, folder = store.kinds[name], store.folders[name]
    if report is not None:
        items, num_bytes, folder = report.items, report.num_bytes, report.folder
        rate = report.encoded / report.seconds
        status = f"{report.encoded:,} encoded in {report.seconds:,.1f} s, {rate:,.0f} items/s"
        status = status if report.encoded else "was already there"
    else:
        items = int((store.arrays[name].lengths > 0).sum())
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        status = "cache_frozen_layers is false, so only the input of the encoder is kept"
        if isinstance(kind, Feature):
            status = "features need no encoder"
        elif kind.modality.training == "full":
            status = "all layers train, so only their input is kept"
        elif kind.modality.cache_frozen_layers:
            status = "the encoder has no layers worth caching, so only its input is kept"
    return f"{name}: {items:,} items, {num_bytes:,} bytes in {folder}; {status}"
