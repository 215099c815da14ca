"""The tensors of a batch, found without its help."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor held anywhere in a batch."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, KeyedJaggedTensor):
        yield value.values()
        yield value.lengths()
    elif isinstance(value, dict):
        for member in value.values():
            yield from tensors_in(member)
    elif isinstance(value, list):
        for member in value:
            yield from tensors_in(member)
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name))
