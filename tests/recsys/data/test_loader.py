"""Threads build the batches that one thread would build, ahead of need; nothing stays behind."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import ModalitySettings
from recsys.data import interactions
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import AHEAD, Interactions, builder_threads, loader
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset, write_parquet
from tests.recsys.data.batch_tensors import tensors_in

BATCH, WINDOW, ROWS = 4, 12, 60  # windows end with a row group, of which there are six


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.row_source.SHUFFLE_ROWS", WINDOW)


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    old_threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= old_threads


pytestmark = pytest.mark.usefixtures("small_windows", "no_threads_left")


def interactions_of(
    root: Path, store: ContentStore | None = None, seed: int | None = 0
) -> Interactions:
    location = Location.of(root)
    rows = ParquetRows.of_split(location, "train", load_schema(location))
    return Interactions(
        rows, BatchBuilder(rows.schema, ["user", "genres"], store), BATCH, seed=seed
    )


def content_of(root: Path, cache: Path) -> ContentStore:
    location = Location.of(root)
    settings = {"clip": ModalitySettings(kind="feature", column="clip")}
    store = ContentStore(ItemTable(location, load_schema(location)), settings, cache)
    store.build("clip")
    return store


def comparable(value: Any) -> Any:
    """What a batch, or a part of it, holds, comparable."""
    if isinstance(value, Tensor | np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, KeyedJaggedTensor):
        return value.keys(), comparable(value.values()), comparable(value.lengths())
    if is_dataclass(value):
        return {item.name: comparable(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {name: comparable(item_value) for name, item_value in value.items()}
    return value


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_batches_are_the_same_for_any_number_of_threads(tmp_path: Path, num_workers: int) -> None:
    root = write_dataset(tmp_path / "data")
    interactions = interactions_of(root, content_of(root, tmp_path / "cache"))
    interactions.begin(2)
    expected = list(map(comparable, interactions))
    assert len(expected) == ROWS // BATCH
    assert list(map(comparable, loader(interactions, num_workers, False))) == expected


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_an_error_is_raised_in_place_of_its_batch_and_names_the_row(
    tmp_path: Path, num_workers: int
) -> None:
    root = write_dataset(tmp_path)
    file = root / "train" / "part-1.parquet"
    table = pq.read_table(file)
    items = table["item"].to_numpy().copy()
    items[25] = 99
    write_parquet(file, table.set_column(1, "item", pa.array(items)), row_group_size=11)
    batches = loader(interactions_of(root, seed=None), num_workers, False)
    positions = []
    with pytest.raises(ValueError, match=f"{file}: column 'item', row 25: id 99 is outside"):
        for batch in batches:
            positions += batch.rows.positions.tolist()
    # Windows end at rows 22, 41 and 60; the batch with rows 40 to 43 needs the last one.
    assert positions == list(range(40))
    assert list(batches) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_only_so_many_batches_are_built_ahead(tmp_path: Path, num_workers: int) -> None:
    interactions = interactions_of(write_dataset(tmp_path))
    interactions.build = build = mock.Mock(wraps=interactions.build)
    batches = loader(interactions, num_workers, False)
    for num_batches in (1, 2, 3):
        next(batches)
        assert num_batches <= build.call_count <= num_batches + AHEAD * num_workers
    batches.close()
    assert build.call_count <= 3 + AHEAD * num_workers


def leave_by_close(batches: Any) -> None:
    next(batches)
    batches.close()


def leave_by_dropping_it(batches: Any) -> None:
    next(batches)


def leave_by_an_error(batches: Any) -> None:
    with pytest.raises(RuntimeError, match="loss"):
        for _ in batches:
            raise RuntimeError("loss")
    batches.close()


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_dropping_it, leave_by_an_error])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_no_thread_is_left_however_a_pass_ends(
    tmp_path: Path, num_workers: int, leave: Callable[[Any], None]
) -> None:
    interactions = interactions_of(write_dataset(tmp_path))
    old_threads = threading.active_count()
    leave(loader(interactions, num_workers, False))
    assert threading.active_count() == old_threads


def test_threads_pin_memory_for_the_gpu_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    with interactions.threads(1, "test") as submit:
        assert submit(lambda: list(devices))() == [3]


def test_a_batch_owns_its_memory(tmp_path: Path) -> None:
    """Ids are mapped in place, which must not reach the rows of the window."""
    interactions = interactions_of(write_dataset(tmp_path))
    expected = list(map(comparable, interactions))
    actual = []
    for batch in interactions:
        actual.append(comparable(batch))
        for tensor in tensors_in(batch):
            tensor.fill_(0)
    assert actual == expected


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(2, 1, 1), (16, 1, 4), (24, 8, 1), (32, 8, 2)]
)
def test_threads_that_build_batches_beside_a_gpu_are_a_rank_s_free_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert builder_threads(for_gpu=True) == threads
    assert builder_threads(for_gpu=False) == 1
