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
        return type(value)(on_fake_gpu(item) for item in value)
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
    items: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    dim, selections = 0, []
    for item in items:
        if item is None:
            tensor = aten.unsqueeze(tensor, dim)
        elif item is Ellipsis:
            dim = tensor.dim() - sum(later is not None for later in items[items.index(...) + 1 :])
            continue
        elif isinstance(item, int):
            tensor = aten.select(tensor, dim, item)
            continue
        elif isinstance(item, slice):
            tensor = aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
        else:
            selection = item
            if not isinstance(item, Tensor):
                selection = torch.tensor(item, dtype=torch.int64, device=tensor.device)
            elif item.dtype == torch.bool:
                selection = _all_indices(item).squeeze(1)
            selections.append((dim, selection))
        dim += 1
    if not selections:
        return tensor
    indices: list[Tensor | None] = [None] * dim
    for position, selection in selections:
        indices[position] = selection
    return aten.index(tensor, indices)


def _all_indices(mask: Tensor) -> Tensor:
    """The indices of a mask [N] of which no number is known: all of them, [N, 1]."""
    return torch.arange(len(mask), device=mask.device).unsqueeze(1)


def _counts(tensor: Tensor, minlength: int = 0) -> Tensor:
    """Counts of numbers below `minlength`, as many as PyTorch's if no number is larger."""
    return torch.zeros(minlength, dtype=torch.int64, device=tensor.device)


_BY_OPERATORS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: lambda tensor, index, value: torch.add(_indexed(tensor, index), value),
    Tensor.__invert__: aten.bitwise_not,
    Tensor.nonzero: _all_indices,
    torch.bincount: _counts,
    Tensor.contiguous: lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
}
