"""Calls of operators and their backwards that a kernel must refuse by name, or compute rightly.

    python -m tests.recsys.kernels.hostile_calls

A process of its own, as a wrong call may end it: each call's name is printed first, and then what
is wrong with its outcome.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from recsys.kernels import choose_kernels
from tests.recsys.kernels.operator_cases import (
    CASES,
    Inputs,
    backward_inputs,
    changed,
    mapped,
    tensors,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
DTYPES += (torch.uint8, torch.bool, torch.complex64)
NUMBERS: dict[str, tuple[Any, ...]] = {
    "heads": (0, -1, 5, 2**62, -(2**63)),
    "layers": (0, -1, 2, 2**40, -(2**63)),
    "scale": (float("nan"), float("inf")),
    "dropout": (-0.1, 1.5, float("nan")),
}
OUTSIDE = (-1, -(2**63), 2**20, 2**62)
PLACES = {"index", "modality", "offsets"}  # numbers that point into other tensors
Call = tuple[str, Inputs, bool]  # name, inputs, and whether the operator must refuse them


def with_number(tensor: Tensor, place: int, number: int) -> Tensor:
    copy = tensor.clone()
    copy[place] = number
    return copy


def types_and_ranks(inputs: Inputs) -> Iterator[Call]:
    for name, tensor in tensors(inputs).items():
        for dtype in DTYPES:
            if dtype != tensor.dtype:
                yield f"{name} {dtype}", changed(inputs, name, tensor.to(dtype)), True
        wider = tensor.unsqueeze(0).repeat(2, *[1] * tensor.dim())
        has_two_ranks = name.startswith("sparse")
        yield f"{name} of one more axis", changed(inputs, name, wider), not has_two_ranks
        if tensor.dim():
            yield f"{name} of no axis", changed(inputs, name, tensor.new_zeros(())), True


def sizes(inputs: Inputs) -> Iterator[Call]:
    """Make each axis shorter and longer: some are those of another size that fits."""
    for name, tensor in tensors(inputs).items():
        for axis, size in enumerate(tensor.shape):
            shorter = [tensor.narrow(axis, 0, count) for count in {0, max(size - 1, 0)}]
            longer = torch.cat([tensor, tensor.narrow(axis, 0, min(size, 1))], dim=axis)
            for part in (*shorter, longer):
                yield f"{name} {list(part.shape)}", changed(inputs, name, part), False


def layouts(inputs: Inputs) -> Iterator[Call]:
    """Give the same numbers at other distances in memory."""
    for name, tensor in tensors(inputs).items():
        if not tensor.dim():
            continue
        apart = tensor.repeat_interleave(3, dim=-1)[..., ::3]
        yield f"{name} with gaps", changed(inputs, name, apart), False
        turned = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        yield f"{name} turned", changed(inputs, name, turned), False
        if tensor.dtype == torch.float32 and len(tensor) and name != "kept":
            same_rows = tensor[:1].expand_as(tensor)
            yield f"{name} expanded", changed(inputs, name, same_rows), False


def numbers(inputs: Inputs) -> Iterator[Call]:
    for name in NUMBERS.keys() & inputs.keys():
        for number in NUMBERS[name]:
            yield f"{name} {number}", inputs | {name: number}, True
    for name in PLACES & inputs.keys():
        for place, number in itertools.product((0, -1), OUTSIDE):
            far = with_number(inputs[name], place, number)
            yield f"{name}[{place}] {number}", inputs | {name: far}, True
    if "offsets" in inputs:
        falling = with_number(inputs["offsets"], 1, int(inputs["offsets"][-1]) + 1)
        yield "offsets that fall", inputs | {"offsets": falling}, True
    if "key" in inputs and "mask" in inputs:
        yield "no token", inputs | {"mask": torch.zeros_like(inputs["mask"])}, True
    if isinstance(inputs.get("weights"), list):
        weights = inputs["weights"]
        for count in (0, 1, len(weights) - 1):
            yield f"{count} weights", inputs | {"weights": weights[:count]}, True
        yield "a weight more", inputs | {"weights": [*weights, weights[0]]}, True
        yield "dropout without noise", inputs | {"dropout": 0.1}, True


def calls(inputs: Inputs) -> Iterator[Call]:
    for kind in (types_and_ranks, sizes, layouts, numbers):
        yield from kind(inputs)


def fault(operator: str, inputs: Inputs, must_refuse: bool) -> str | None:
    """Return what is wrong with the outcome of a call."""
    try:
        found = getattr(torch.ops.recsys, operator)(*inputs.values())
    except RuntimeError as error:
        is_named = str(error).startswith(f"recsys::{operator}: ")
        return None if is_named else f"{type(error).__name__}: {error}"
    if must_refuse:
        return "is accepted"
    case = CASES.get(operator)
    if case is None:  # a backward
        parts = [
            part for value in found for part in (value if isinstance(value, list) else [value])
        ]
        return "NaN" if any(part.isnan().any() for part in parts) else None
    widths = 2 if operator == "content_interest" else 1
    outputs = [found] if isinstance(found, Tensor) else list(found[:widths])
    wide = mapped(inputs, lambda _, part: part.double() if part.is_floating_point() else part)
    expected = case.reference(wide)
    if torch.allclose(torch.cat(outputs, dim=-1).double(), expected, 1e-4, 1e-4):
        return None
    return "differs from plain operations"


def main() -> None:
    choose_kernels("native")
    torch.manual_seed(0)
    for operator, case in CASES.items():
        inputs = case.make(*case.shapes["usual"])
        outputs = getattr(torch.ops.recsys, operator)(*inputs.values())
        of_backward = backward_inputs(operator, inputs, outputs)
        both = {operator: inputs, f"{operator}_backward": of_backward}
        for name, usual in both.items():
            for call, hostile, must_refuse in calls(usual):
                print(f"{name}: {call}", flush=True)
                wrong = fault(name, hostile, must_refuse)
                if wrong:
                    print(f"WRONG {wrong}", flush=True)


if __name__ == "__main__":
    main()
