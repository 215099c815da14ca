"""Tensors of the Open Inference Protocol: JSON or raw bytes <-> numbers and strings.

Shapes: any; the values of a tensor are flat, in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.serving.server.refusals import Refusal

BYTES = "BYTES"
TYPES = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a request."""

    name: str
    shape: tuple[int, ...]
    values: list[Any]  # flat

    @staticmethod
    def of_values(name: str, datatype: str, shape: Sequence[int], data: Any) -> Tensor:
        """Read a tensor of which the values are given, flat or nested as the shape.

        A value may be null, which stands for an unknown id.

        Raises:
            Refusal: a value is not of the type, or they do not fit the shape.
        """
        count = _count(name, datatype, shape)
        values = _flat(name, shape, data)
        if len(values) != count:
            raise Refusal(f"input '{name}': has {len(values)} values for shape {list(shape)}")
        known = [value for value in values if value is not None]
        if datatype == BYTES:
            read = iter([_text(name, value) for value in known])
        else:
            read = iter(_numbers(name, datatype, known).tolist())
        values_or_null = [None if value is None else next(read) for value in values]
        return Tensor(name, tuple(shape), values_or_null)

    @staticmethod
    def of_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
        """Read a tensor of which the bytes are given.

        Raises:
            Refusal: they do not fit type and shape.
        """
        count = _count(name, datatype, shape)
        if datatype == BYTES:
            values = [_text(name, text) for text in _strings(name, raw)]
            fits = len(values) == count
        else:
            kind = np.dtype(TYPES[datatype])
            fits = len(raw) == count * kind.itemsize
            values = np.frombuffer(raw, kind).tolist() if fits else []
        if not fits:
            raise Refusal(f"input '{name}': {len(raw)} bytes do not fit {datatype} {list(shape)}")
        return Tensor(name, tuple(shape), values)


def _count(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Return the number of values of a tensor."""
    if datatype != BYTES and datatype not in TYPES:
        raise Refusal(f"input '{name}': datatype '{datatype}' is none of {[*TYPES, BYTES]}")
    if not 1 <= len(shape) <= 2 or min(shape) < 0:
        raise Refusal(f"input '{name}': shape {list(shape)[:9]}; give one or two sizes")
    return math.prod(shape)


def _flat(name: str, shape: Sequence[int], data: Sequence[Any]) -> list[Any]:
    """Return the values of a list that is flat or nested as the shape.

    Raises:
        Refusal: it is nested in another way, in which values would change their rows.
    """
    if len(shape) == 1 or not any(isinstance(row, list) for row in data):
        return list(data)
    sizes = {len(row) if isinstance(row, list) else None for row in data}
    if len(data) != shape[0] or sizes != {shape[1]}:
        raise Refusal(f"input '{name}': its lists do not have the shape {list(shape)}")
    return [value for row in data for value in row]


def _numbers(name: str, datatype: str, values: list[Any]) -> np.ndarray:
    wanted = {"B": (bool,), "I": (int,), "U": (int,), "F": (int, float)}[datatype[0]]
    for value in values:
        if type(value) not in wanted:
            raise Refusal(f"input '{name}': a value of type {type(value).__name__} in {datatype}")
    try:
        return np.array(values, TYPES[datatype])
    except OverflowError as error:
        raise Refusal(f"input '{name}': a value is out of range of {datatype}") from error


def _text(name: str, value: Any) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise Refusal(f"input '{name}': a string is not UTF-8") from error
    if not isinstance(text, str):
        raise Refusal(f"input '{name}': a value of type {type(value).__name__} in BYTES")
    return text


def _strings(name: str, raw: bytes) -> Iterator[bytes]:
    """Yield strings, each after its length in four bytes."""
    place = 0
    while place < len(raw):
        start = place + 4
        place = start + int.from_bytes(raw[place:start], "little")
        if place > len(raw) or start > len(raw):
            raise Refusal(f"input '{name}': its bytes end within a string")
        yield raw[start:place]
