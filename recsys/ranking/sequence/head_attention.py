"""Dot products and weighted sums of several heads over jagged tokens, without a copy per head.

Keys [T, H * D] are a table of T * H rows of width D, in which head h of token t is row t * H + h.
So the kernels of `embedding_bag` that `JaggedHistory` uses read each head where it lies, and the
gradients of all heads are written as one tensor.

Shapes: B rows, T tokens, one row of the batch after the other; H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.data.jagged_history import JaggedHistory


def head_dots(history: JaggedHistory, queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Return the dot product of each token and its row's query, by head, with both gradients.

    Args:
        history: of T tokens, in their order.
        queries: [B, H * D].
        keys: [T, H * D].
        heads: H.

    Returns:
        [H, T].
    """
    return _Dots.apply(queries, keys, history, heads)


def head_sums(history: JaggedHistory, weights: Tensor, values: Tensor) -> Tensor:
    """Return the sums [B, H * D] of values [T, H * D] with weights [H, T], by row and head."""
    return _Sums.apply(weights, values, history)


def _dots(history: JaggedHistory, of_rows: Tensor, table: Tensor, heads: int) -> Tensor:
    """Return dot products [H, T] of rows [B, H * D] and tokens [T, H * D]."""
    split = table.view(-1, table.shape[1] // heads)
    return torch.stack(
        [
            torch.ops.aten._embedding_bag_per_sample_weights_backward(
                part.contiguous(),
                split,
                history.index * heads + head,
                history.offsets[:-1],
                history.rows,
                0,
            )
            for head, part in enumerate(of_rows.chunk(heads, dim=1))
        ]
    )


def _sums(history: JaggedHistory, weights: Tensor, table: Tensor) -> Tensor:
    """Return sums [B, H * D] of tokens [T, H * D] with weights [H, T]."""
    heads = weights.shape[0]
    split = table.view(-1, table.shape[1] // heads)
    sums = [
        F.embedding_bag(
            history.index * heads + head,
            split,
            history.offsets,
            mode="sum",
            per_sample_weights=of_head,
            include_last_offset=True,
        )
        for head, of_head in enumerate(weights.contiguous())
    ]
    return torch.cat(sums, dim=1)


def _products(history: JaggedHistory, of_rows: Tensor, weights: Tensor) -> Tensor:
    """Return the row [B, H * D] of each token times its weights [H, T]: [T, H * D]."""
    products = of_rows.index_select(0, history.rows)
    heads = weights.shape[0]
    products.view(-1, heads, products.shape[1] // heads).mul_(weights.T.unsqueeze(2))
    return products


class _Dots(torch.autograd.Function):
    """Autograd of queries [B, H * D], keys [T, H * D] -> [H, T]."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, history: JaggedHistory, heads: int
    ) -> Tensor:
        ctx.history = history
        ctx.save_for_backward(queries, keys)
        return _dots(history, queries, keys, heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        queries, keys = ctx.saved_tensors
        of_queries = _sums(ctx.history, gradient, keys)
        return of_queries, _products(ctx.history, queries, gradient), None, None


class _Sums(torch.autograd.Function):
    """Autograd of weights [H, T], values [T, H * D] -> [B, H * D]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, history: JaggedHistory) -> Tensor:
        ctx.history = history
        ctx.save_for_backward(weights, values)
        return _sums(history, weights, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, values = ctx.saved_tensors
        of_weights = _dots(ctx.history, gradient, values, weights.shape[0])
        return of_weights, _products(ctx.history, gradient, weights), None
