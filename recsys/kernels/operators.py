"""Operators with their backward, and the types of their inputs.

Kernels read float32, int64 and bool. The functions `native_...` cast; operators refuse other types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Operator:
    """`recsys::NAME` and `recsys::NAME_backward`, for autograd and `torch.compile`.

    The backward reads the gradients of the results, the saved outputs, and inputs by name:
    tensors, then a list of tensors, then numbers.
    """

    name: str
    inputs: str  # arguments, as in a schema of torch.library
    backward_inputs: str
    gradients: tuple[str, ...]  # inputs whose gradients the backward returns, in this order
    num_outputs: int
    num_results: int = 1  # the first outputs; the others are saved for the backward
    zero_gradients: tuple[str, ...] = ()  # inputs whose gradient is zero
    without_gradient: tuple[str, ...] = ()  # inputs that are refused if they require a gradient

    def define(self, fake: Callable[..., Any]) -> None:
        """Register the operators; `fake` returns outputs of the right shapes."""
        kinds, outputs = self._kinds(), ", ".join(["Tensor"] * self.num_outputs)
        gradients = ", ".join(kinds[part] for part in self.gradients)
        forward, backward = f"recsys::{self.name}", f"recsys::{self.name}_backward"
        torch.library.define(forward, f"({self.inputs}) -> ({outputs})")
        torch.library.define(backward, f"({self.backward_inputs}) -> ({gradients})")
        torch.library.register_fake(forward, fake)
        torch.library.register_fake(backward, self._fake_backward)
        torch.library.register_autograd(forward, self._backward, setup_context=self._save)
        torch.library.register_autograd(backward, self._refuse_second_derivative)

    def _kinds(self) -> dict[str, str]:
        return {part.split()[1]: part.split()[0] for part in self.inputs.split(", ")}

    def _arguments(self) -> list[str]:
        return [part.split()[1] for part in self.backward_inputs.split(", ")]

    def _fake_backward(self, *values: Any) -> tuple[Any, ...]:
        by_name = dict(zip(self._arguments(), values, strict=True))
        return tuple(_empty_like(by_name[part]) for part in self.gradients)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kinds = self._kinds()
        by_name = dict(zip(kinds, inputs, strict=True))
        for part in self.without_gradient:
            if by_name[part].requires_grad:
                raise ValueError(
                    f"recsys::{self.name}: {part} requires a gradient, which this operator does "
                    "not compute; detach it, or set kernels to torch"
                )
        outputs = output if self.num_outputs > 1 else (output,)
        values = [by_name[part] for part in self._arguments()[self.num_outputs :]]
        lists = [value for value in values if isinstance(value, list | tuple)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        ctx.numbers = values[len(tensors) + len(lists) :]
        ctx.list_sizes = {part: len(by_name[part]) for part in kinds if "[]" in kinds[part]}
        ctx.shapes = [result.shape for result in outputs[: self.num_results]]
        ctx.zero_shapes = {part: by_name[part].shape for part in self.zero_gradients}
        ctx.save_for_backward(*outputs[self.num_results :], *tensors, *chain(*lists))
        ctx.mark_non_differentiable(*outputs[self.num_results :])
        ctx.set_materialize_grads(False)  # no zeros for saved tensors, megabytes

    def _backward(self, ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        by_name: dict[str, Any] = {part: [None] * size for part, size in ctx.list_sizes.items()}
        like = next((gradient for gradient in incoming if gradient is not None), None)
        if like is not None:  # something reads a result
            values = list(ctx.saved_tensors)
            for size in ctx.list_sizes.values():
                values[len(values) - size :] = [values[len(values) - size :]]
            gradients = [
                like.new_zeros(shape) if gradient is None else gradient
                for gradient, shape in zip(incoming, ctx.shapes)
            ]
            compute = getattr(torch.ops.recsys, f"{self.name}_backward")
            computed = compute(*gradients, *values, *ctx.numbers)
            by_name |= dict(zip(self.gradients, computed, strict=True))
            by_name |= {part: like.new_zeros(shape) for part, shape in ctx.zero_shapes.items()}
        return tuple(by_name.get(part) for part in self._kinds())

    def _refuse_second_derivative(self, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"recsys::{self.name} has no second derivative; set kernels to torch, whose operations "
            "have one"
        )


def _empty_like(value: Tensor | Sequence[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return value.new_empty(value.shape)
    return [part.new_empty(part.shape) for part in value]


def row_stride(width: int) -> int:
    """Return the distance of rows of this width in kernels' memory: `distance_of` in C++."""
    whole = (width + 15) // 16 * 16
    return whole + 16 if whole >= 128 else whole


def as_float32(operator: str, **inputs: Tensor) -> list[Tensor]:
    """Return inputs in float32; of other types than FLOATS they are a ValueError.

    A forward-mode derivative, which would be zero in silence, is a RuntimeError.
    """
    if is_forward_mode():
        message = f"recsys::{operator} has no forward-mode derivative; set kernels to torch"
        raise RuntimeError(message)
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
    return reduce(torch.promote_types, (tensor.dtype for tensor in inputs))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
