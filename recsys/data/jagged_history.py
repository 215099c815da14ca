"""Histories as an index into their unique items, and the arithmetic on it, without padding.

A batch's histories hold N items but far fewer distinct ones, U. All that is computed of an item
alone (looked-up rows, content vectors, linear maps) is computed for U; scores and weights are N
numbers; no [N, D] and no [B, longest, D] is made by `dot` and `weighted_sum`, so that memory and
time grow with the items that are there. Their kernels are those of `embedding_bag` with weights per
sample, which run on CPU and CUDA: the sum is its forward, and the gradient of its weights is the
dot product of each item with its row.

Shapes: B batch, U unique items, N history items of the batch, D dimension, K any width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class JaggedHistory:
    """The histories of a batch; see the module for the letters.

    index: int64 [N], which unique item, the rows of the batch one after the other.
    lengths: int64 [B].
    longest: of `lengths`.
    num_items: U.

    Example::

        history = JaggedHistory.of(torch.tensor([0, 1, 0]), torch.tensor([2, 1]), num_items=2)
        items = torch.eye(2)
        weights = history.softmax(history.dot(torch.ones(2, 2), items))  # [.5, .5, 1]
        history.weighted_sum(weights, items)  # [[.5, .5], [1, 0]]
    """

    index: Tensor
    lengths: Tensor
    offsets: Tensor  # [B + 1]
    rows: Tensor  # [N], the row of the batch that each item belongs to
    longest: int
    num_items: int

    @staticmethod
    def of(
        index: Tensor, lengths: Tensor, num_items: int, longest: int | None = None
    ) -> JaggedHistory:
        """Look the `longest` of the lengths up where it is not given, which waits for a GPU."""
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        batch = torch.arange(len(lengths), device=lengths.device)
        rows = torch.repeat_interleave(batch, lengths, output_size=len(index))
        longest = int(lengths.max()) if longest is None else longest
        return JaggedHistory(index, lengths, offsets, rows, max(longest, 1), num_items)

    def unindexed(self) -> JaggedHistory:
        """Return the same histories over N items that are not unique, each one of its own."""
        index = torch.arange(len(self.index), device=self.index.device)
        return replace(self, index=index, num_items=len(index))

    def select(self, places: Tensor) -> JaggedHistory:
        """Return the histories of some of their places (rising), over the same unique items."""
        lengths = torch.bincount(self.rows[places], minlength=len(self.lengths))
        return JaggedHistory.of(self.index[places], lengths, self.num_items, self.longest)

    def highest(
        self,
        scores: Tensor,  # [N]
        count: int,
    ) -> Tensor:  # places, rising
        """Return the places of the `count` highest scores of each row; all of a shorter one.

        Of equal scores the later place is taken.
        """
        last = len(scores) - 1
        order = last - scores.flip(0).argsort(descending=True, stable=True)
        order = order[_stable_order(self.rows[order], len(self.lengths))]  # by row, then by score
        position = torch.arange(len(scores), device=scores.device) - self.offsets[self.rows]
        return order[position < count].sort().values

    @cached_property
    def ages(self) -> Tensor:
        """Return int64 [N]: how many items of the same row are newer, that is, come after it."""
        places = torch.arange(len(self.rows), device=self.rows.device)
        return self.offsets[1:][self.rows] - 1 - places

    @cached_property
    def by_item(self) -> tuple[Tensor, Tensor, Tensor]:
        """Transpose the index: places [N] ordered by item, their rows [N], and offsets [U + 1] of
        the items."""
        counts = torch.bincount(self.index, minlength=self.num_items)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(counts)
        order = _stable_order(self.index, self.num_items)
        return order, self.rows[order], offsets

    def gather(self, items: Tensor) -> Tensor:
        """Map [U, K] -> [N, K], with gradient."""
        return _Gather.apply(items, self)

    def spread(self, of_rows: Tensor) -> Tensor:
        """Map [B, K] -> [N, K], with gradient."""
        return _Spread.apply(of_rows, self)

    def sum(self, values: Tensor) -> Tensor:
        """Sum [N, K] by row: [B, K], with gradient."""
        return _Sum.apply(values, self)

    def dot(
        self,
        queries: Tensor,  # [B, D]
        items: Tensor,  # [U, D]
    ) -> Tensor:  # [N]
        """Return each history item times the query of its row, with gradient for both."""
        return _Dot.apply(queries, items, self)

    def weighted_sum(
        self,
        weights: Tensor,  # [N]
        items: Tensor,  # [U, D]
    ) -> Tensor:  # [B, D]
        """Return the items of each row times their weights, summed, with gradient for both."""
        return _WeightedSum.apply(weights, items, self)

    def softmax(self, scores: Tensor) -> Tensor:
        """Normalise [N, K] or [N] over the items of each row."""
        columns = scores if scores.dim() == 2 else scores.unsqueeze(1)
        softmax = torch.ops.fbgemm.jagged_softmax(columns.contiguous(), self.offsets, self.longest)[
            0
        ]
        return softmax.view(scores.shape)

    def maximum(self, values: Tensor, of_nothing: float) -> Tensor:
        """Take maxima of [N, K] by row: [B, K], with gradient; of an empty one `of_nothing`."""
        return torch.segment_reduce(values, "max", lengths=self.lengths, initial=of_nothing)

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """Pad [N] to [B, longest]."""
        return torch.ops.fbgemm.jagged_to_padded_dense(
            values.unsqueeze(1), [self.offsets], [self.longest], padding_value=fill
        ).squeeze(-1)

    def _sum_rows(self, weights: Tensor, items: Tensor) -> Tensor:
        """Return the sum over each row of weights [N] times items[index]: [B, D]."""
        return _bag(self.index, items, self.offsets, weights)

    def _sum_items(self, weights: Tensor, of_rows: Tensor) -> Tensor:
        """Return the sum over each item's places of weights [N] times of_rows[rows]: [U, D]."""
        order, rows, offsets = self.by_item
        return _bag(rows, of_rows, offsets, weights[order])

    def _dots(self, of_rows: Tensor, items: Tensor) -> Tensor:
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            of_rows.contiguous(), items.contiguous(), self.index, self.offsets[:-1], self.rows, 0
        )


def _stable_order(numbers: Tensor, limit: int) -> Tensor:
    """Return `numbers.argsort(stable=True)` of numbers in [0, limit)."""
    if numbers.device.type == "cpu" and limit <= 2**16:
        # numpy sorts 16 bits by radix, ten times as fast as 64 are compared.
        return torch.from_numpy(np.argsort(numbers.numpy().astype(np.uint16), kind="stable"))
    return numbers.argsort(stable=True)


def _bag(index: Tensor, vectors: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    if not vectors.shape[1]:  # which the kernel refuses
        return vectors.new_zeros(len(offsets) - 1, 0)
    return F.embedding_bag(
        index,
        vectors.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items: Tensor, history: JaggedHistory) -> Tensor:
        ctx.history = history
        return items.index_select(0, history.index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        order, _, offsets = ctx.history.by_item
        return _bag(order, gradient, offsets, None), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_rows: Tensor, history: JaggedHistory) -> Tensor:
        ctx.history = history
        return of_rows.index_select(0, history.rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _row_sums(gradient, ctx.history), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, history: JaggedHistory) -> Tensor:
        ctx.history = history
        return _row_sums(values, history)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.index_select(0, ctx.history.rows), None


def _row_sums(values: Tensor, history: JaggedHistory) -> Tensor:
    places = torch.arange(len(values), device=values.device)
    return _bag(places, values, history.offsets, None)


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, history: JaggedHistory) -> Tensor:
        ctx.history = history
        ctx.save_for_backward(queries, items)
        return history._dots(queries, items)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        queries, items = ctx.saved_tensors
        history, (wants_queries, wants_items, _) = ctx.history, ctx.needs_input_grad
        return (
            history._sum_rows(gradient, items) if wants_queries else None,
            history._sum_items(gradient, queries) if wants_items else None,
            None,
        )


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, items: Tensor, history: JaggedHistory) -> Tensor:
        ctx.history = history
        ctx.save_for_backward(weights, items)
        return history._sum_rows(weights, items)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, items = ctx.saved_tensors
        history, (wants_weights, wants_items, _) = ctx.history, ctx.needs_input_grad
        return (
            history._dots(gradient, items) if wants_weights else None,
            history._sum_items(weights, gradient) if wants_items else None,
            None,
        )
