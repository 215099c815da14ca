"""Registration of operators, the types of their inputs, and refused inputs.

Kernels read float32, int64 and bool. The functions `native_...` cast; operators refuse other types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def register(
    name: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Register what `torch.compile` and autograd need of an operator and of its backward.

    The backward of `NAME_backward` raises an error, in place of giving zeros.
    """

    def refuse_second_derivative(ctx: Any, *gradients: Any) -> NoReturn:
        del ctx, gradients
        raise RuntimeError(
            f"recsys::{name} has no second derivative; set kernels to torch, whose operations "
            "have one"
        )

    torch.library.register_fake(f"recsys::{name}", fake)
    torch.library.register_fake(f"recsys::{name}_backward", fake_backward)
    torch.library.register_autograd(f"recsys::{name}", backward, setup_context=save)
    torch.library.register_autograd(f"recsys::{name}_backward", refuse_second_derivative)


def empty_like_each(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return contiguous tensors of the same shapes: the fake gradients of these inputs."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def row_stride(width: int) -> int:
    """Return the distance of rows of this width in kernels' memory: `distance_of` in C++."""
    whole = (width + 15) // 16 * 16
    return whole + 16 if whole >= 128 else whole


def as_float32(operator: str, **inputs: Tensor) -> list[Tensor]:
    """Return inputs in float32, in which kernels compute.

    Raises:
        ValueError: an input is of another type than float32, bfloat16 or float16.
        RuntimeError: a forward-mode derivative is computed, which would be zero in silence.
    """
    if is_forward_mode():
        raise RuntimeError(
            f"recsys::{operator} has no forward-mode derivative; set kernels to torch"
        )
    for name, tensor in inputs.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"recsys::{operator}: {name} is {_name(tensor.dtype)}, but must be float32, "
                "bfloat16 or float16; set kernels to torch for other types"
            )
    return [tensor.float() for tensor in inputs.values()]


def as_int64(operator: str, **inputs: Tensor) -> list[Tensor]:
    """Return inputs in int64; raise a ValueError unless they are int64 or int32."""
    for name, tensor in inputs.items():
        if tensor.dtype not in INTEGERS:
            raise ValueError(
                f"recsys::{operator}: {name} is {_name(tensor.dtype)}, but must be int64 or int32"
            )
    return [tensor.long() for tensor in inputs.values()]


def is_forward_mode() -> bool:
    """Return whether derivatives are computed beside the forward, as in `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the type of a result that sums in float32: float32 under autocast, else the widest."""
    if torch.is_autocast_enabled(inputs[0].device.type):
        return torch.float32
    dtype = inputs[0].dtype
    for tensor in inputs[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def refuse_gradient(operator: str, **inputs: Tensor) -> None:
    """Raise a ValueError for inputs that require a gradient which the operator lacks."""
    for name, tensor in inputs.items():
        if tensor.requires_grad:
            raise ValueError(
                f"recsys::{operator}: {name} requires a gradient, which this operator does not "
                "compute; detach it, or set kernels to torch"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
