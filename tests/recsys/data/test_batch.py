"""Batches: their parts, and columns that are read as Arrow has them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.memory_bank import BankRoute
from recsys.data import batch_builder
from recsys.data.batch import (
    Batch,
    BatchContent,
    ContentInput,
    EncodedItems,
    ExtraHistory,
    FullHistories,
    History,
    ItemExchange,
    Negatives,
    Rows,
    TargetItems,
)
from recsys.data.batch_builder import UniqueItems, keyed_jagged, unique_by_hashing
from recsys.data.parquet.columns import RowColumns
from tests.recsys.data.batch_tensors import tensors_in


def keyed(key: str) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        keys=[key], values=torch.tensor([4, 2, 7]), lengths=torch.tensor([1, 2], dtype=torch.int32)
    )


def filled(kind: type, **values: Any) -> Any:
    """A part of a batch, with a tensor in each field that is not given."""
    tensors = {item.name: torch.arange(2.0) for item in fields(kind) if item.name not in values}
    return kind(**tensors, **values)


def a_batch() -> Batch:
    content = filled(
        BatchContent,
        inputs={
            "text": ContentInput(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)),
            "clip": ContentInput(torch.zeros(2, 1, 6), torch.ones(2, 1, dtype=torch.bool)),
        },
        with_gradient=1,
        bank_reads=BankRoute(torch.tensor([0, 1]), [2], torch.tensor([3, 4]), [2]),
        bank_writes=BankRoute(torch.tensor([1, 0]), [2], torch.tensor([5, 6]), [2]),
        encoded=EncodedItems(torch.tensor([0]), None, None),
        exchange=ItemExchange(torch.tensor([1, 0]), send_counts=[2], receive_counts=[2]),
    )
    return filled(
        Batch,
        sparse_features=keyed("user"),
        sequence_features=keyed("item"),
        rows=filled(Rows),
        target=filled(TargetItems),
        history=filled(
            History,
            longest=2,
            host_lengths=np.ones(2),
            extras=[filled(ExtraHistory, longest=1)],
            full=filled(FullHistories, longest=2, host_lengths=np.ones(2)),
        ),
        content=content,
        negatives=filled(Negatives),
    )


def test_a_batch_has_all_that_a_torchrec_batch_has() -> None:
    assert {item.name for item in fields(TorchRecBatch)} <= {item.name for item in fields(Batch)}


def test_to_moves_every_tensor() -> None:
    batch = a_batch()
    moved = batch.to(torch.device("meta"))
    assert len(list(tensors_in(moved))) == len(list(tensors_in(batch))) == 46
    assert {tensor.device.type for tensor in tensors_in(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors_in(batch)} == {"cpu"}


def test_pin_memory_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor, *_: Any) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = a_batch().pin_memory()
    ours = {id(tensor) for tensor in pinned}
    assert all(id(tensor) in ours for tensor in tensors_in(batch))


def test_record_stream_names_every_tensor_to_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor.data_ptr())
    )
    batch = a_batch()
    batch.record_stream(mock.Mock())
    assert {tensor.data_ptr() for tensor in tensors_in(batch)} <= set(recorded)


TABLE = pa.table(
    {
        "user": pa.array([5, 6, 7, 8, 9]),
        "history": pa.array([[1, 2], None, [3], [], [4, 5, 6]], pa.list_(pa.int64())),
        "liked": pa.array([[0, 1], [], [1], None, [1, 0, 1]], pa.list_(pa.float32())),
        "genres": pa.array([[], [1], [2, 2], [], []], pa.list_(pa.int64())),
        "price": pa.array([0.5, 1, 2, 3, 4], pa.float32()),
    }
)


def lists(columns: RowColumns, name: str) -> list[list[float]]:
    ends = np.cumsum(columns.lengths(name))
    return [array.tolist() for array in np.split(columns.values(name), ends)[:-1]]


def assert_like(columns: RowColumns, table: pa.Table) -> None:
    assert columns.num_rows == table.num_rows
    for name in ("user", "price"):
        assert columns.numbers[name].tolist() == table[name].to_pylist()
        assert columns.lengths(name).tolist() == [1] * table.num_rows
    for name in ("history", "liked", "genres"):
        assert lists(columns, name) == [row or [] for row in table[name].to_pylist()]


@pytest.mark.parametrize("rows", [[], [0], [4, 0, 2], [3, 1, 3], [4, 4, 4, 0, 1, 2, 3]])
def test_rows_are_taken_as_arrow_takes_them(rows: list[int]) -> None:
    selected = RowColumns.of(TABLE).take(np.array(rows, np.int64))
    assert_like(selected, TABLE.take(pa.array(rows, pa.int64())))


def test_slices_and_chunks_of_a_table_are_read_alike() -> None:
    assert_like(RowColumns.of(TABLE.slice(1, 3)), TABLE.slice(1, 3))
    chunks = pa.concat_tables([TABLE.slice(3), TABLE.slice(0, 2)])
    assert_like(RowColumns.of(chunks), chunks)


def test_parts_are_laid_end_to_end_whatever_lists_are_equally_long_in_each() -> None:
    other = TABLE.slice(3, 1)  # where all lists are empty
    assert len(RowColumns.of(other).lists) == 1
    blocks = [RowColumns.of(TABLE), RowColumns.of(other)]
    assert_like(RowColumns.concat(blocks), pa.concat_tables([TABLE, other]))
    assert_like(RowColumns.concat(blocks[::-1]), pa.concat_tables([other, TABLE]))
    assert RowColumns.concat(blocks[:1]) is blocks[0]


def test_a_keyed_jagged_tensor_is_the_one_that_torchrec_makes() -> None:
    values, lengths = [np.array([4, 2, 7]), np.array([9])], [np.array([1, 2]), np.array([0, 1])]
    actual = keyed_jagged(["user", "tags"], values, lengths)
    expected = KeyedJaggedTensor.from_lengths_sync(
        keys=["user", "tags"],
        values=torch.tensor([4, 2, 7, 9]),
        lengths=torch.tensor([1, 2, 0, 1], dtype=torch.int32),
    )
    assert actual.keys() == expected.keys()
    assert actual.values().equal(expected.values())
    assert (actual.lengths().dtype, actual.lengths().tolist()) == (torch.int32, [1, 2, 0, 1])
    # Known without a look at the tensors, which on a GPU would wait for it.
    assert actual.length_per_key_or_none() == expected.length_per_key() == [3, 1]
    assert actual.offset_per_key_or_none() == expected.offset_per_key() == [0, 3, 4]
    assert actual.stride() == expected.stride() == 2


def assert_like_numpy(actual: tuple[np.ndarray, np.ndarray], items: np.ndarray) -> None:
    for one, other in zip(actual, np.unique(items, return_inverse=True), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.int64
        assert one.flags.writeable


@pytest.mark.parametrize("max_flags", [0, 1 << 22])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("num_items", [1, 2, 50, 2000])
def test_unique_items_are_those_of_numpy(
    num_items: int, count: int, max_flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_builder, "MAX_FLAGS", max_flags)
    rng = np.random.default_rng((num_items, count))
    unique = UniqueItems(num_items)
    for _ in range(3):  # nothing stays of a call before
        items = rng.integers(num_items, size=count)
        assert_like_numpy(unique(items), items)


def test_ids_of_any_size_are_hashed() -> None:
    items = np.array([2**62, 5, 2**62, 0, 2**40])
    assert_like_numpy(unique_by_hashing(items), items)
    assert_like_numpy(UniqueItems(2**62 + 1)(items), items)


def test_threads_do_not_disturb_each_other() -> None:
    unique = UniqueItems(500)
    draws = [np.random.default_rng(seed).integers(500, size=5000) for seed in range(64)]
    with ThreadPoolExecutor(4) as pool:
        for actual, items in zip(pool.map(unique, draws), draws, strict=True):
            assert_like_numpy(actual, items)
