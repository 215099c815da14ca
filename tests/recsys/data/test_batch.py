"""A batch is moved, pinned and handed to a stream whole: no tensor is forgotten."""

from dataclasses import fields
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.memory_bank import BankRoute
from recsys.data.batch import (
    Batch,
    BatchContent,
    ContentInput,
    FurtherHistory,
    History,
    ItemExchange,
    Negatives,
    Rows,
    TargetItems,
)
from tests.recsys.data.batch_tensors import tensors_in


def keyed(key: str) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        keys=[key], values=torch.tensor([4, 2, 7]), lengths=torch.tensor([1, 2], dtype=torch.int32)
    )


def part(kind: type, **given: Any) -> Any:
    """A part of a batch, with a tensor in each field that is not given."""
    tensors = {item.name: torch.arange(2.0) for item in fields(kind) if item.name not in given}
    return kind(**tensors, **given)


def a_batch() -> Batch:
    content = part(
        BatchContent,
        inputs={
            "text": ContentInput(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)),
            "clip": ContentInput(torch.zeros(2, 1, 6), torch.ones(2, 1, dtype=torch.bool)),
        },
        with_gradient=1,
        bank_reads=BankRoute(torch.tensor([0, 1]), [2], torch.tensor([3, 4]), [2]),
        bank_writes=BankRoute(torch.tensor([1, 0]), [2], torch.tensor([5, 6]), [2]),
        exchange=ItemExchange(torch.tensor([1, 0]), send_counts=[2], receive_counts=[2]),
    )
    return part(
        Batch,
        sparse_features=keyed("user"),
        sequence_features=keyed("item"),
        rows=part(Rows),
        target=part(TargetItems),
        history=part(
            History, longest=2, host_lengths=np.ones(2), further=[part(FurtherHistory, longest=1)]
        ),
        content=content,
        negatives=part(Negatives),
    )


def test_a_batch_has_all_that_a_torchrec_batch_has() -> None:
    assert {item.name for item in fields(TorchRecBatch)} <= {item.name for item in fields(Batch)}


def test_to_moves_every_tensor() -> None:
    batch = a_batch()
    moved = batch.to(torch.device("meta"))
    assert len(list(tensors_in(moved))) == len(list(tensors_in(batch))) == 41
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
