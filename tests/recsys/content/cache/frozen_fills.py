"""Fills of the cache of a few texts that count what they encode and fail where they are told to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from recsys.content.cache.fill import cache_frozen_outputs
from recsys.content.encoders.build import Encoder
from recsys.data.batch import ContentInput
from recsys.data.items.content_store import ContentStore
from recsys.distributed.ranks import Ranks
from tests.ranks import HANG_SECONDS
from tests.recsys.content.cache.frozen_outputs import (
    NUM_ITEMS,
    encoder_of,
    modality_of,
    outputs,
    store_of,
)

WITH_TEXT = NUM_ITEMS - 2
TEXT = modality_of("text", "lora")
CALLS = 4  # of two items each


class Interrupted(Exception):
    pass


class Watched:
    """Counts what an encoder encodes; fails at a call, or stands still from a call on."""

    def __init__(
        self, encoder: Encoder, fail_at: int | None = None, stand_at: int | None = None
    ) -> None:
        self.items = self.calls = 0
        self._encode, self._fail_at, self._stand_at = encoder.frozen_outputs, fail_at, stand_at
        encoder.frozen_outputs = self  # type: ignore[method-assign, assignment]

    def __call__(self, content: ContentInput) -> ContentInput:
        if self.calls == self._fail_at:
            raise Interrupted("on purpose")
        if self.calls == self._stand_at:
            time.sleep(HANG_SECONDS)
        self.calls += 1
        self.items += len(content.mask)
        return self._encode(content)


def expected_outputs(dataset: Path) -> dict[str, Any]:
    return outputs(store_of(dataset, "text", TEXT), "text", encoder_of("text", TEXT))


def fill(
    dataset: Path, ranks: Ranks, fail_at: int | None = None
) -> tuple[ContentStore, Encoder, Watched]:
    store, encoder = store_of(dataset, "text", TEXT), encoder_of("text", TEXT)
    watched = Watched(encoder, fail_at)
    cache_frozen_outputs(store, "text", encoder, ranks)
    return store, encoder, watched


def parts_in(dataset: Path) -> list[Path]:
    return sorted((dataset.parent / "cache").glob(".frozen-text-*.parts/*.part"))


def assert_nothing_else_is_left(dataset: Path) -> None:
    left = sorted(path.name.split("-")[0] for path in (dataset.parent / "cache").iterdir())
    assert left == ["frozen", "text"]
