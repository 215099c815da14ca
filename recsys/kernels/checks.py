"""The types of an operator's inputs and results, and what an operator refuses by its name.

Kernels read float32, int64 and bool. The functions `native_...` cast to them what PyTorch's
operations would take; the operators themselves, in C++ and Triton, refuse every other type or
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


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
    """Return inputs in int64.

    Raises:
        ValueError: an input is of another type than int64 or int32.
    """
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
    """Return the type of a result that sums in float32: float32 under autocast, else the widest.

    A module of bfloat16 gives bfloat16, so that the next layer of its model takes it.

    Example::

        import torch
        from recsys.kernels import result_dtype

        result_dtype(torch.ones(1), torch.ones(1, dtype=torch.bfloat16))  # torch.float32
    """
    if torch.is_autocast_enabled(inputs[0].device.type):
        return torch.float32
    dtype = inputs[0].dtype
    for tensor in inputs[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True)
class InputChecks:
    """Checks of an operator's inputs in Triton; those of C++ are in `cpp/tensors.h`.

    operator: name of the operator.
    device: device of its first input.
    """

    operator: str
    device: torch.device

    def require(
        self, name: str, tensor: Tensor, shape: Sequence[int | None], dtype: torch.dtype
    ) -> None:
        """Require a type, a shape and the device of an input; None is any size.

        Raises:
            RuntimeError: the input has another one.
        """
        sizes = [has if size is None else size for has, size in zip(tensor.shape, shape)]
        fits = tensor.dim() == len(shape) and list(tensor.shape) == sizes
        if fits and (tensor.dtype, tensor.device) == (dtype, self.device):
            return
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise RuntimeError(
            f"recsys::{self.operator}: {name} is {_name(tensor.dtype)} of shape "
            f"{list(tensor.shape)} on {tensor.device}, but must be {_name(dtype)} of shape "
            f"[{expected}] on {self.device}"
        )

    def require_all(self, condition: Tensor, text: str) -> None:  # bool, any shape
        """Require a condition of numbers on the device, without waiting for it there."""
        torch._assert_async(condition.all(), f"recsys::{self.operator}: {text}")


def refuse_gradient(operator: str, **inputs: Tensor) -> None:
    """Refuse inputs that require a gradient which the operator does not compute.

    Raises:
        ValueError: an input requires a gradient.
    """
    for name, tensor in inputs.items():
        if tensor.requires_grad:
            raise ValueError(
                f"recsys::{operator}: {name} requires a gradient, which this operator does not "
                "compute; detach it, or set kernels to torch"
            )


def refuse_second_derivative(operator: str) -> None:
    """Let the backward of an operator's backward raise an error, in place of giving zeros."""

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        del ctx, gradients
        raise RuntimeError(
            f"recsys::{operator} has no second derivative; set kernels to torch, whose operations "
            "have one"
        )

    torch.library.register_autograd(f"recsys::{operator}_backward", refuse)


def _name(dtype: torch.dtype) -> str:
    """Return a type's name without its module."""
    return str(dtype).removeprefix("torch.")
