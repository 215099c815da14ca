"""What tests of the cache of frozen outputs share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.content.cache import fill as frozen_cache
from recsys.distributed.ranks import Ranks, joined_ranks
from tests.datasets import write_dataset
from tests.recsys.content.cache.frozen_outputs import NUM_ITEMS


@pytest.fixture(autouse=True)
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_cache, "ITEMS_PER_CALL", 2)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with joined_ranks("cpu") as alone:
        yield alone


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", num_items=NUM_ITEMS)
