"""A batch is moved, pinned and handed to a stream whole: no tensor is forgotten."""

import dataclasses
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.memory_bank import BankRoute
from recsys.data.batch import Batch, ContentInput, FurtherHistory, ItemExchange


def keyed(key: str) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        keys=[key], values=torch.tensor([4, 2, 7]), lengths=torch.tensor([1, 2], dtype=torch.int32)
    )


def a_batch() -> Batch:
    jagged = {"sparse_features": keyed("user"), "sequence_features": keyed("item")}
    integers = {"longest_history": 2, "with_gradient": 1}
    routes: dict[str, Any] = {
        "exchange": ItemExchange(torch.tensor([1, 0]), send_counts=[2], receive_counts=[2]),
        "bank_reads": BankRoute(torch.tensor([0, 1]), [2], torch.tensor([3, 4]), [2]),
        "bank_writes": BankRoute(torch.tensor([1, 0]), [2], torch.tensor([5, 6]), [2]),
    }
    tensors = {
        item.name: torch.arange(2.0)
        for item in fields(Batch)
        if item.name not in (*jagged, *integers, *routes, "labels", "content", "further")
    }
    content = {
        "text": ContentInput(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)),
        "clip": ContentInput(torch.zeros(2, 1, 6), torch.ones(2, 1, dtype=torch.bool)),
    }
    return Batch(
        **jagged,  # type: ignore[arg-type]
        **tensors,  # type: ignore[arg-type]
        **integers,  # type: ignore[arg-type]
        labels=torch.zeros(2, 1),
        content=content,
        further=[FurtherHistory(torch.ones(2), torch.zeros(2, 1), 1, torch.zeros(2))],
        **routes,
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor held anywhere in a batch, found without its help."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, KeyedJaggedTensor):
        yield value.values()
        yield value.lengths()
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name))


def test_a_batch_has_all_that_a_torchrec_batch_has() -> None:
    assert {item.name for item in fields(TorchRecBatch)} <= {item.name for item in fields(Batch)}


def test_to_moves_every_tensor() -> None:
    batch = a_batch()
    moved = batch.to(torch.device("meta"))
    assert len(list(tensors_in(moved))) == len(list(tensors_in(batch))) == 40
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
