"""Defines operators with a backward, checks types of inputs, and defines three operators.

Kernels read float32, int64 and bool. The functions `native_...` cast; operators refuse other types.
`recsys::content_interest` is attention and cosines over items without gradient: a linear map of the
items moves to the B queries, q . (M v) = (M^T q) . v. `recsys::dot_interaction` has the products of
all pairs of vectors of a DLRM, `recsys::fusion` is the Fusion-Q-Former of preset `modern`.
Shapes: B batch, U unique items, N history items of the batch, D dimension, S spaces with
similarities, P parallel lists, F features of a space, or sparse features of a DLRM,
I = F * (F + 1) / 2 pairs, T tokens of an item, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

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
        types, outputs = self._types(), ", ".join(["Tensor"] * self.num_outputs)
        gradients = ", ".join(types[name] for name in self.gradients)
        forward, backward = f"recsys::{self.name}", f"recsys::{self.name}_backward"
        torch.library.define(forward, f"({self.inputs}) -> ({outputs})")
        torch.library.define(backward, f"({self.backward_inputs}) -> ({gradients})")
        torch.library.register_fake(forward, fake)
        torch.library.register_fake(backward, self._fake_backward)
        torch.library.register_autograd(forward, self._backward, setup_context=self._save)
        torch.library.register_autograd(backward, self._refuse_second_derivative)

    def _types(self) -> dict[str, str]:
        return {argument.split()[1]: argument.split()[0] for argument in self.inputs.split(", ")}

    def _arguments(self) -> list[str]:
        return [argument.split()[1] for argument in self.backward_inputs.split(", ")]

    def _fake_backward(self, *values: Any) -> tuple[Any, ...]:
        by_name = dict(zip(self._arguments(), values, strict=True))
        inputs = tuple(by_name[name] for name in self.gradients)
        return tree_map(lambda tensor: tensor.new_empty(tensor.shape), inputs)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        types = self._types()
        by_name = dict(zip(types, inputs, strict=True))
        for name in self.without_gradient:
            if by_name[name].requires_grad:
                raise ValueError(
                    f"recsys::{self.name}: {name} requires a gradient, which this operator does "
                    "not compute; detach it, or set kernels to torch"
                )
        outputs = output if self.num_outputs > 1 else (output,)
        values = [by_name[name] for name in self._arguments()[self.num_outputs :]]
        lists = [value for value in values if isinstance(value, list | tuple)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        ctx.numbers = values[len(tensors) + len(lists) :]
        ctx.list_sizes = {name: len(by_name[name]) for name in types if "[]" in types[name]}
        ctx.shapes = [result.shape for result in outputs[: self.num_results]]
        ctx.zero_shapes = {name: by_name[name].shape for name in self.zero_gradients}
        ctx.save_for_backward(*outputs[self.num_results :], *tensors, *chain(*lists))
        ctx.mark_non_differentiable(*outputs[self.num_results :])
        ctx.set_materialize_grads(False)  # zeros for saved tensors would take megabytes

    def _backward(self, ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        by_name: dict[str, Any] = {name: [None] * size for name, size in ctx.list_sizes.items()}
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
            by_name |= {name: like.new_zeros(shape) for name, shape in ctx.zero_shapes.items()}
        return tuple(by_name.get(name) for name in self._types())

    def _refuse_second_derivative(self, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"recsys::{self.name} has no second derivative; set kernels to torch, whose operations "
            "have one"
        )


def row_stride(width: int) -> int:
    """Return the distance of rows of this width in kernels' memory: `distance_of` in C++."""
    padded = (width + 15) // 16 * 16
    return padded + 16 if padded >= 128 else padded


def as_float32(operator: str, **inputs: Tensor) -> list[Tensor]:
    """Return inputs in float32; a type that is not in FLOATS is a ValueError.

    A forward-mode derivative, which would silently be zero, is a RuntimeError.
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


def rounds_products(device: torch.device) -> bool:
    """Return whether autocast asks kernels to round factors of products to bfloat16."""
    name = device.type
    return torch.is_autocast_enabled(name) and torch.get_autocast_dtype(name) == torch.bfloat16


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the type of a result that sums in float32: float32 under autocast, else the widest."""
    if torch.is_autocast_enabled(inputs[0].device.type):
        return torch.float32
    return reduce(torch.promote_types, (tensor.dtype for tensor in inputs))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_INTEREST_INPUTS = (
    "Tensor queries, Tensor items, Tensor map, Tensor index, Tensor offsets, Tensor of_lists, "
    "Tensor parallel"
)


def native_content_interest(
    queries: Tensor,  # [B, 1 + S, D]: of the attention, then a unit vector in each space
    items: Tensor,  # [U, max(S, 1) * D or more], without gradient: a vector per space
    map_: Tensor,  # [D, D], M of the first vectors, which `items` has before the map
    index: Tensor,  # int64 [N], the item at each position, one row after the other
    offsets: Tensor,  # int64 [B + 1]; positions of a row are `offsets[b]` to `offsets[b + 1]`
    list_factors: Tensor,  # [B, P], factors of the parallel lists in the scores
    parallel: Tensor,  # [N, P], numbers beside each position, without gradient
) -> tuple[Tensor, Tensor]:  # [B, D + P], [B, S * F]
    """Return attention's weighted sums and the similarity features, in float32, by a kernel.

    Sums are of the items' first vectors v and the lists, by the softmax of queries[b, 0] . v +
    list_factors[b] . parallel[n]. Features are those of `similarity_features`. Queries for the
    first vectors are already multiplied by the transposed map.
    """
    operator = "content_interest"
    vectors = as_float32(operator, queries=queries, items=items, map=map_)
    indices = as_int64(operator, index=index, offsets=offsets)
    lists = as_float32(operator, of_lists=list_factors, parallel=parallel)
    sums, features, *_ = torch.ops.recsys.content_interest(*vectors, *indices, *lists)
    return sums, features


def _fake_interest(queries: Tensor, items: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    _, index, _, _, parallel = inputs
    batch, spaces, dim = queries.shape[0], queries.shape[1] - 1, queries.shape[2]
    lists, num_events = parallel.shape[1], index.shape[0]
    return (
        queries.new_empty(batch, dim + lists),
        queries.new_empty(batch, spaces * (2 + 5 * lists)),
        queries.new_empty(num_events),
        queries.new_empty(spaces, num_events),
        queries.new_empty(items.shape[0], spaces),
    )


Operator(
    "content_interest",
    inputs=_INTEREST_INPUTS,
    backward_inputs="Tensor of_sums, Tensor of_features, Tensor weights, Tensor cosines, "
    f"Tensor inverse, {_INTEREST_INPUTS}",
    gradients=("queries", "map", "of_lists"),
    num_outputs=5,
    num_results=2,
    without_gradient=("items", "parallel"),
).define(_fake_interest)


def native_dot_interaction(
    dense: Tensor,  # [B, D]
    sparse: Tensor | Sequence[Tensor],  # [B, F, D], or F tensors [B, D], read where they are
) -> Tensor:  # [B, D + I]
    """Return the dense vector and the dot products of pairs, by a kernel, of PyTorch's type."""
    tensors = [sparse] if isinstance(sparse, Tensor) else list(sparse)
    vectors = {f"sparse[{index}]": tensor for index, tensor in enumerate(tensors)}
    dense32, *sparse32 = as_float32("dot_interaction", dense=dense, **vectors)
    out: Tensor = torch.ops.recsys.dot_interaction(dense32, sparse32)
    device = dense.device.type
    if torch.is_autocast_enabled(device):
        return out.to(torch.promote_types(dense.dtype, torch.get_autocast_dtype(device)))
    return out.to(result_dtype(dense, *tensors))


def _fake_dots(dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
    fields = sum(tensor.shape[1] if tensor.dim() == 3 else 1 for tensor in sparse)
    return dense.new_empty(dense.shape[0], dense.shape[1] + fields * (fields + 1) // 2)


Operator(
    "dot_interaction",
    inputs="Tensor dense, Tensor[] sparse",
    backward_inputs="Tensor gradient, Tensor dense, Tensor[] sparse",
    gradients=("dense", "sparse"),
    num_outputs=1,
).define(_fake_dots)


_FUSION_INPUTS = (
    "Tensor tokens, Tensor mask, Tensor modality, Tensor noise, Tensor[] weights, int layers, "
    "int heads, float scale, float dropout, bool bfloat16"
)
_LAYER_WEIGHTS, _UP_INDEX = 16, 12  # index of the map from D to the hidden units


def native_fusion(
    tokens: Tensor,  # [U, T, D]
    mask: Tensor,  # bool [U, T], False for a token that an item lacks
    modality: Tensor,  # int64 [T]
    noise: Tensor,
    weights: Sequence[Tensor],
    layers: int,
    heads: int,  # H, which divides D
    scale: float,  # factor of the dot products
    dropout: float,  # probability, after attention and after the feed-forward network
) -> Tensor:  # [U, D]
    """Return one vector per item, of autocast's type or else the widest of tokens and weights.

    `noise` has the uniform numbers of the dropouts, one after the other; a number below
    `dropout` drops. `weights` are `FusionQFormer.weights()`.
    """
    named_weights = {f"weights[{index}]": weight for index, weight in enumerate(weights)}
    vectors, *floats = as_float32("fusion", tokens=tokens, **named_weights)
    (modalities,) = as_int64("fusion", modality=modality)
    inputs = vectors, mask, modalities, noise.float(), floats, layers, heads, scale, dropout
    fused: Tensor = torch.ops.recsys.fusion(*inputs, rounds_products(tokens.device))[0]
    device = tokens.device.type
    if torch.is_autocast_enabled(device):
        return fused.to(torch.get_autocast_dtype(device))  # as its last operation would
    return fused.to(result_dtype(tokens, *weights[:1]))


def _fake_fusion(tokens: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    _, _, _, weights, layers, heads, *_ = inputs
    dim, queries = tokens.shape[2], weights[0].shape[0]
    rows, num_saved = queries + tokens.shape[1], queries * dim
    for layer in range(layers):
        outputs = rows if layer + 1 < layers else queries
        units = weights[2 + layer * _LAYER_WEIGHTS + _UP_INDEX].shape[0]
        num_saved += rows * dim + 2 * (rows + outputs) * row_stride(dim)
        num_saved += outputs * (row_stride(units) + heads * rows)
    return tokens.new_empty(tokens.shape[0], dim), tokens.new_empty(tokens.shape[0] * num_saved)


Operator(
    "fusion",
    inputs=_FUSION_INPUTS,
    backward_inputs=f"Tensor gradient, Tensor kept, {_FUSION_INPUTS}",
    gradients=("tokens", "weights"),
    num_outputs=2,
).define(_fake_fusion)
