"""State of any torch.optim optimizer as named tensors, for checkpoints.

A Python number in the state becomes a tensor with a marked name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# How Python numbers are stored: mark in the name, type, type of the tensor.
_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "#bool": (bool, torch.bool),
    "#int": (int, torch.int64),
    "#float": (float, torch.float64),
}


def state_tensors(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Return the state of each parameter as `PARAMETER.KEY`; tensors share their memory."""
    state = {}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD without momentum
                continue
            name = f"{names[parameter]}.{key}"
            if isinstance(value, Tensor):
                state[name] = value
                continue
            mark = next((m for m, (kind, _) in _NUMBERS.items() if type(value) is kind), None)
            if mark is None:
                raise ValueError(
                    f"optimizer {type(optimizer).__name__} keeps a {type(value).__name__} as "
                    f"'{key}' of parameter '{names[parameter]}'; a checkpoint holds tensors and "
                    "numbers"
                )
            state[name + mark] = torch.tensor(value, dtype=_NUMBERS[mark][1])
    return state


def make_room(
    optimizer: Optimizer,
    names: Mapping[nn.Parameter, str],
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> dict[str, Tensor]:
    """Replace an optimizer's state by uninitialised tensors of a checkpoint's names and sizes."""
    room = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[parameter]}."
            optimizer.state.pop(parameter, None)
            for name, (size, dtype) in stored.items():
                key = name.removeprefix(prefix)
                if key == name or "." in key:
                    continue
                room[name] = torch.empty(size, dtype=dtype, device=_device(group, parameter, key))
                optimizer.state[parameter][key] = room[name]
    return room


def numbers_loaded(optimizer: Optimizer) -> None:
    """Turn the marked tensors into Python numbers after a load."""
    for parameter in _parameters(optimizer):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for mark, (kind, _) in _NUMBERS.items():
            for key in [key for key in state if key.endswith(mark)]:
                state[key.removesuffix(mark)] = kind(state.pop(key).item())


def _device(group: dict[str, Any], parameter: nn.Parameter, key: str) -> torch.device:
    """Return the device of an entry of the state: torch.optim may keep the step on the host."""
    stays = group.get("fused") or group.get("capturable")
    on_host = key.endswith(tuple(_NUMBERS)) or (key == "step" and not stays)
    return torch.device("cpu") if on_host else parameter.device


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
