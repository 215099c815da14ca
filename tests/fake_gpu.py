"""Tensors on a GPU that is not there: shapes, types and devices, no numbers.

PyTorch's FakeTensorMode runs a program on such tensors and refuses operations whose arguments are
on different devices. In a PyTorch without CUDA some functions look for the device before they call
an operator: moving a tensor to cuda, indexing, and a few more. Operators replace them here. There
are no gradients, as autograd looks for the device as well.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Operators take tensors of `on_fake_gpu` and of nothing else."""
    with torch.no_grad(), FakeTensorMode(), _ByOperators():
        yield


def on_fake_gpu(value: Any) -> Any:
    """The same with each tensor replaced by one on the GPU; modules are changed in place."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = on_fake_gpu(tensor)
        return value
    if isinstance(value, Tensor):
        result = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        return nn.Parameter(result, False) if isinstance(value, nn.Parameter) else result
    if isinstance(value, list | tuple):
        return type(value)(on_fake_gpu(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        result = {field.name: on_fake_gpu(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **result)
    return value


class _ByOperators(TorchFunctionMode):
    """Replaces functions that look for the device by the operators that they consist of."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _BY_OPERATORS.get(func, func)(*args, **(kwargs or {}))


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    parts: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    dim, places = 0, []
    for part in parts:
        if part is None:
            tensor = aten.unsqueeze(tensor, dim)
        elif part is Ellipsis:
            dim = tensor.dim() - sum(after is not None for after in parts[parts.index(...) + 1 :])
            continue
        elif isinstance(part, int):
            tensor = aten.select(tensor, dim, part)
            continue
        elif isinstance(part, slice):
            tensor = aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        else:
            selection = part
            if not isinstance(part, Tensor):
                selection = torch.tensor(part, dtype=torch.int64, device=tensor.device)
            elif part.dtype == torch.bool:
                selection = _places(part).squeeze(1)
            places.append((dim, selection))
        dim += 1
    if not places:
        return tensor
    indices: list[Tensor | None] = [None] * dim
    for place, selection in places:
        indices[place] = selection
    return aten.index(tensor, indices)


def _places(mask: Tensor) -> Tensor:
    """The places of a mask [N] of which no number is known: all of them, [N, 1]."""
    return torch.arange(len(mask), device=mask.device).unsqueeze(1)


def _counts(tensor: Tensor, minlength: int = 0) -> Tensor:
    """Counts of numbers below `minlength`, as many as PyTorch's if no number is larger."""
    return torch.zeros(minlength, dtype=torch.int64, device=tensor.device)


_BY_OPERATORS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: lambda tensor, index, value: torch.add(_indexed(tensor, index), value),
    Tensor.__invert__: aten.bitwise_not,
    Tensor.nonzero: _places,
    torch.bincount: _counts,
    Tensor.contiguous: lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
}
