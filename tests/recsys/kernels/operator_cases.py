"""Inputs of each operator at several shapes, and its mathematics in plain PyTorch of any type.

Shapes: as in the module of each operator in `recsys.kernels`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from recsys.content.fusion import FusionQFormer
from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import (
    ScoreWeights,
    native_content_interest,
    native_dot_interaction,
    native_fusion,
    native_target_attention,
)
from recsys.ranking.dlrm import dot_interaction, pair_indices
from recsys.ranking.layers.content_interest import num_similarity_features, similarity_features

Inputs = dict[str, Any]  # tensors, lists of tensors and numbers, in the order of the schema
Result = Tensor


@dataclass(frozen=True)
class Case:
    """An operator.

    make: inputs of float32 that fit together, of one of the `shapes`.
    native: the result of the function `native_...`; those of `content_interest` joined.
    reference: the same in plain PyTorch.
    without_gradient: inputs that get none.
    """

    make: Callable[..., Inputs]
    shapes: dict[str, tuple[Any, ...]]
    native: Callable[[Inputs], Result]
    reference: Callable[[Inputs], Result]
    without_gradient: tuple[str, ...] = ()


def history(lengths: list[int], num_items: int) -> tuple[Tensor, Tensor]:
    offsets = F.pad(torch.tensor(lengths, dtype=torch.long).cumsum(0), (1, 0))
    return torch.randint(max(num_items, 1), (sum(lengths),)), offsets


def target_attention(
    lengths: list[int], num_items: int, dim: int, hidden: int, units: int, lists: int
) -> Inputs:
    index, offsets = history(lengths, num_items)
    weights = [
        torch.randn(hidden, 4 * dim) / 4,
        torch.randn(hidden),
        torch.randn(units, hidden) / 4,
    ]
    weights += [torch.randn(units), torch.randn(1, units) / 4, torch.randn(1)]
    return {
        "target": torch.randn(len(lengths), dim),
        "items": torch.randn(num_items, dim),
        "index": index,
        "offsets": offsets,
        "parallel": torch.rand(len(index), lists),
        "lists": torch.randn(dim, lists),
        **dict(zip(ScoreWeights._fields, weights, strict=True)),
        "keeps_units": True,
        "bfloat16": False,
    }


def native_attention(inputs: Inputs) -> Result:
    *vectors, _, _ = inputs.values()
    return native_target_attention(*vectors[:6], ScoreWeights(*vectors[6:]))


def plain_attention(inputs: Inputs) -> Result:
    score, rows = ScoreWeights(*(inputs[name] for name in ScoreWeights._fields)), []
    for row, (start, end) in enumerate(pairwise(inputs["offsets"].tolist())):
        vectors = inputs["items"][inputs["index"][start:end].long()]
        vectors = vectors + inputs["parallel"][start:end] @ inputs["lists"].T
        target = inputs["target"][row].expand_as(vectors)
        pairs = torch.cat([vectors, target, vectors - target, vectors * target], dim=1)
        first = F.linear(pairs, score.first, score.first_bias).relu()
        second = F.linear(first, score.second, score.second_bias).relu()
        weights = F.linear(second, score.last, score.last_bias).softmax(dim=0)
        rows.append((weights * vectors).sum(dim=0))
    return torch.stack(rows) if rows else inputs["target"].clone()


def content_interest(
    lengths: list[int], num_items: int, dim: int, spaces: int, lists: int
) -> Inputs:
    index, offsets = history(lengths, num_items)
    queries = torch.randn(len(lengths), 1 + spaces, dim)
    return {
        "queries": torch.cat([queries[:, :1], F.normalize(queries[:, 1:], dim=-1)], dim=1),
        "items": torch.randn(num_items, max(spaces, 1) * dim + 1)[:, :-1],
        "map": torch.randn(dim, dim),
        "index": index,
        "offsets": offsets,
        "of_lists": torch.randn(len(lengths), lists),
        "parallel": torch.rand(len(index), lists),
    }


def native_interest(inputs: Inputs) -> Result:
    return torch.cat(native_content_interest(*inputs.values()), dim=1)


def plain_interest(inputs: Inputs) -> Result:
    queries, items, matrix, index, offsets, list_factors, parallel = inputs.values()
    index, dim, spaces = index.long(), queries.shape[2], queries.shape[1] - 1
    if not len(queries):  # PyTorch has no maxima of no rows
        lists = parallel.shape[1]
        width = dim + lists + spaces * num_similarity_features(lists)
        return queries.new_zeros(0, width) + queries.sum() + matrix.sum() + list_factors.sum()
    jagged = JaggedHistory.of(index, offsets.long().diff(), len(items))
    vectors = items[:, : max(spaces, 1) * dim].unflatten(1, (-1, dim))  # [U, S, D]
    event_vectors, row_queries = vectors[index], queries[jagged.rows]
    scores = (row_queries[:, 0] * event_vectors[:, 0]).sum(1) + (
        list_factors[jagged.rows] * parallel
    ).sum(1)
    weights = jagged.softmax(scores).unsqueeze(1)
    sums = [jagged.sum(weights * event_vectors[:, 0]), jagged.sum(weights * parallel)]
    if not spaces:
        return torch.cat(sums, dim=1)
    mapped = [vectors[:, 0] @ matrix.T, *vectors[:, 1:].unbind(1)]
    lengths = torch.stack(mapped, dim=1).norm(dim=2).clamp(min=1e-12)[index]
    cosines = (row_queries[:, 1:] * event_vectors).sum(2) / lengths
    return torch.cat([*sums, similarity_features(cosines, jagged, parallel)], dim=1)


def fusion(items: int, modality: list[int], queries: int, layers: int, dim: int) -> Inputs:
    module = FusionQFormer(dim, max(modality, default=0) + 1, queries, layers, 2, dropout=0.0)
    weights = [weight.detach() + 0.2 * torch.randn(weight.shape) for weight in module.weights()]
    return {
        "tokens": torch.randn(items, len(modality), dim),
        "mask": torch.rand(items, len(modality)) < 0.7,
        "modality": torch.tensor(modality, dtype=torch.long),
        "noise": torch.empty(0),
        "weights": weights,
        "layers": layers,
        "heads": 2,
        "scale": (dim // 2 + 1e-5) ** -0.5,
        "dropout": 0.0,
        "bfloat16": False,
    }


def native_fused(inputs: Inputs) -> Result:
    *read, layers, heads, scale, dropout, _ = inputs.values()
    return native_fusion(*read, layers, heads, scale, dropout)


def plain_fused(inputs: Inputs) -> Result:
    tokens, mask, modality, _, weights, layers, *_ = inputs.values()
    queries, modalities = len(weights[0]), len(weights[1])
    module = FusionQFormer(tokens.shape[2], modalities, queries, layers, 2, dropout=0.0)
    module = module.to(tokens.dtype)
    indices = {id(weight): index for index, weight in enumerate(module.weights())}
    by_name = {name: weights[indices[id(tensor)]] for name, tensor in module.named_parameters()}
    return functional_call(module, by_name, (tokens, mask, modality.long()))


def dots(rows: int, dim: int, fields: list[int]) -> Inputs:
    """Fields of 0 are a tensor of two axes, and others one of that many vectors."""
    sparse = [torch.randn(rows, *([field] if field else []), dim) for field in fields]
    return {"dense": torch.randn(rows, dim), "sparse": sparse}


def plain_dots(inputs: Inputs) -> Result:
    dense = inputs["dense"]
    blocks = [block if block.dim() == 3 else block.unsqueeze(1) for block in inputs["sparse"]]
    sparse = torch.cat([dense.new_empty(len(dense), 0, dense.shape[1]), *blocks], dim=1)
    return dot_interaction(dense, sparse, pair_indices(sparse.shape[1] + 1))


CASES = {
    "target_attention": Case(
        target_attention,
        {
            "usual": ([2, 0, 5, 1], 4, 5, 6, 3, 2),
            "no rows": ([], 3, 4, 6, 3, 1),
            "empty histories": ([0, 0], 3, 4, 6, 3, 1),
            "no items": ([0], 0, 4, 6, 3, 0),
            "no width": ([2, 5], 3, 0, 6, 3, 1),
            "no units": ([2, 5], 3, 4, 0, 0, 1),
            "long": ([70, 3, 130], 40, 17, 20, 18, 0),
        },
        native_attention,
        plain_attention,
        ("parallel",),
    ),
    "content_interest": Case(
        content_interest,
        {
            "usual": ([2, 0, 5, 1], 4, 5, 2, 1),
            "no rows": ([], 3, 4, 1, 1),
            "empty histories": ([0, 0], 3, 4, 1, 1),
            "no items": ([0], 0, 4, 1, 1),
            "no similarities": ([2, 5], 3, 4, 0, 0),
            "long": ([70, 3, 130], 40, 17, 1, 2),
        },
        native_interest,
        plain_interest,
        ("items", "parallel"),
    ),
    "fusion": Case(
        fusion,
        {
            "usual": (3, [0, 1], 2, 1, 4),
            "no items": (0, [0, 1], 2, 1, 4),
            "no tokens": (3, [], 2, 2, 4),
            "long": (70, [1, 0, 1], 1, 2, 18),
        },
        native_fused,
        plain_fused,
        ("noise",),
    ),
    "dot_interaction": Case(
        dots,
        {
            "usual": (3, 5, [0, 2]),
            "no rows": (0, 5, [0, 2]),
            "no fields": (3, 5, []),
            "no width": (3, 0, [2]),
            "long": (130, 17, [26]),
        },
        lambda inputs: native_dot_interaction(*inputs.values()),
        plain_dots,
    ),
}


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """Return all tensors by the name that errors give them."""
    by_name: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, list):
            by_name |= {f"{name}[{index}]": tensor for index, tensor in enumerate(value)}
        elif isinstance(value, Tensor):
            by_name[name] = value
    return by_name


def mapped(inputs: Inputs, change: Callable[[str, Tensor], Any]) -> Inputs:
    """Return the inputs with `change(name, tensor)` in place of each tensor."""
    new = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, list):
            new[name] = [change(f"{name}[{index}]", tensor) for index, tensor in enumerate(value)]
        elif isinstance(value, Tensor):
            new[name] = change(name, value)
    return new


def changed(inputs: Inputs, name: str, tensor: Tensor) -> Inputs:
    """Return the inputs with another tensor of a name."""
    return mapped(inputs, lambda other, value: tensor if other == name else value)
