"""`recsys cache`: fills the caches of item content for a configuration, without training.

`recsys train` fills missing caches by itself; this command does it in advance, on other or more
machines, or again after items have changed.
"""

from __future__ import annotations

from pathlib import Path

from recsys.config import Config, content_settings
from recsys.content.build import build_content_store
from recsys.content.encoders.base import CacheReport
from recsys.content.kinds.feature import Feature
from recsys.data.filesystem import Location
from recsys.data.items.content_store import ContentStore
from recsys.data.schema import load_schema
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks


def fill_caches(config: Config, data: str, ranks: Ranks) -> dict[str, CacheReport | None]:
    """Fill missing caches and print a line per modality. A collective.

    Returns:
        by modality, the report on the cache of its encoder's frozen part; None without a cache.

    Raises:
        ValueError: on every rank, if the configuration has no content or the data cannot be used.
    """
    content = content_settings(config)
    if content is None:
        raise ValueError(
            "content is none: there is nothing to cache; give a configuration with content"
        )
    with ranks.raise_on_all_ranks():
        root = Location.of(data)
        schema = load_schema(root)
    store, encoders = build_content_store(config, content, root, schema, ranks)
    reports = {name: encoder.cache_report for name, encoder in encoders.items()}
    if ranks.is_first:
        print_table("\n".join(_line(name, report, store) for name, report in reports.items()))
    return reports


def _line(name: str, report: CacheReport | None, store: ContentStore) -> str:
    if report is None:
        folder, items = store.folders[name], int((store.arrays[name].lengths > 0).sum())
        size = _size(items, sum(path.stat().st_size for path in folder.iterdir()), folder)
        return f"{name}: {size}; {_why_nothing_is_encoded(name, store)}"
    size = _size(report.items, report.num_bytes, report.folder)
    if not report.encoded:
        return f"{name}: {size}; was already there"
    rate = report.encoded / report.seconds
    return (
        f"{name}: {size}; {report.encoded:,} encoded in {report.seconds:,.1f} s, "
        f"{rate:,.0f} items/s"
    )


def _size(items: int, num_bytes: int, folder: Path) -> str:
    return f"{items:,} items, {num_bytes:,} bytes in {folder}"


def _why_nothing_is_encoded(name: str, store: ContentStore) -> str:
    kind = store.kinds[name]
    modality = kind.modality
    if isinstance(kind, Feature):
        return "features need no encoder"
    if modality.training == "full":
        return "all layers train, so only their input is kept"
    return "cache_frozen_layers is false, so only the input of the encoder is kept"
