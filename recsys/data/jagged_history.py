"""Histories as an index into their unique items, and differentiable operations without padding.

`dot` and `weighted_sum` use kernels of `embedding_bag` and allocate no [N, D] tensor. Shapes: B
batch, U unique items, N positions (in all histories), P some of them, D dimension, K any width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embeddings.host import is_on_host


@dataclass
class JaggedHistory:
    """Histories of a batch, concatenated row by row."""

    index: Tensor  # int64 [N], the unique item at each position
    lengths: Tensor  # int64 [B]
    offsets: Tensor  # [B + 1]
    rows: Tensor  # [N], the batch row of each position
    longest: int  # maximum of lengths, at least 1
    num_items: int  # U
    host_lengths: np.ndarray | None = None  # copy of `lengths` on the host, if there is one
    _computed: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def of(
        index: Tensor,
        lengths: Tensor,
        num_items: int,
        longest: int | None = None,
        host_lengths: np.ndarray | None = None,
    ) -> JaggedHistory:
        """Build a `JaggedHistory`; without `longest` it is computed, which waits for a GPU."""
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        batch = torch.arange(len(lengths), device=lengths.device)
        rows = torch.repeat_interleave(batch, lengths, output_size=len(index))
        longest = max(int(lengths.max()) if longest is None else longest, 1)
        return JaggedHistory(index, lengths, offsets, rows, longest, num_items, host_lengths)

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same history; False here, True in a class of `serving`."""
        return False

    def of_one_row(self, values: Tensor) -> Tensor:
        """Map [N, K] of a shared history to the positions of one row; a TypeError here."""
        raise TypeError("rows have histories of their own")

    def one_row(self) -> JaggedHistory:
        """Return a shared history as one row; a TypeError here."""
        raise TypeError("rows have histories of their own")

    def unindexed(self) -> JaggedHistory:
        """Return the same histories over N items, a separate item for each position."""
        return replace(self, index=self.positions, num_items=len(self.positions))

    def select(self, positions: Tensor, count: int | None = None) -> JaggedHistory:
        """Return histories of ascending positions [P]; at most `count` of a row are among these."""
        lengths, host_lengths = _counts(self.rows[positions], len(self.lengths)), None
        if count is not None and self.host_lengths is not None:
            host_lengths = self.host_lengths.clip(max=count)
        index = self.index[positions]
        return JaggedHistory.of(index, lengths, self.num_items, self.longest, host_lengths)

    def highest(self, scores: Tensor, count: int) -> Tensor:  # [N] -> [P], ascending
        """Return the positions of each row's `count` highest scores; later positions win ties."""
        last = len(scores) - 1
        order = last - scores.flip(0).argsort(descending=True, stable=True)
        order = order[_stable_order(self.rows[order], len(self.lengths))]  # by row, then by score
        position = self.positions - self.offsets[self.rows]
        return order[self._positions_where(position < count, count)].sort().values

    def newest(self, count: int) -> Tensor:
        """Return the positions [P] of each row's newest `count` items, or all if it has fewer."""
        return self._positions_where(self.ages < count, count)

    def _positions_where(self, mask: Tensor, count: int) -> Tensor:  # bool [N] -> [P]
        """Return positions where `mask` is True: `count` in each row, or all if it has fewer."""
        if is_on_host(mask) or self.host_lengths is None:
            return mask.nonzero().squeeze(1)
        size = int(self.host_lengths.clip(max=count).sum())
        return mask.nonzero_static(size=size).squeeze(1)

    @property
    def positions(self) -> Tensor:
        """All positions, 0 to N - 1: int64 [N]."""
        count, device = self.rows.shape[0], self.rows.device
        return self._cached("positions", lambda: torch.arange(count, device=device))

    @property
    def ages(self) -> Tensor:
        """Number of newer (later) items of the same row, for each position: int64 [N]."""
        return self._cached("ages", lambda: self.offsets[1:][self.rows] - 1 - self.positions)

    @property
    def by_item(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index by item: positions [N] sorted by item, their rows [N], offsets of items [U + 1]."""
        return self._cached("by_item", self._index_by_item)

    def _index_by_item(self) -> tuple[Tensor, Tensor, Tensor]:
        counts = _counts(self.index, self.num_items)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(counts)
        order = _stable_order(self.index, self.num_items)
        return order, self.rows[order], offsets

    def _cached(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a value that is computed once; torch.compile cannot trace `cached_property`."""
        if torch.compiler.is_compiling():
            return compute()
        if name not in self._computed:
            self._computed[name] = compute()
        return self._computed[name]

    def _apply(self, name: str, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            tensors = self.index, self.lengths, self.offsets, self.rows
            return _apply_in_graph(name, list(inputs), *tensors, self.longest, self.num_items)
        result: Tensor = _FUNCTIONS[name].apply(*inputs, self)
        return result

    def gather(self, items: Tensor) -> Tensor:
        """Return the row of `items` for each place, with gradient: [U, K] -> [N, K]."""
        return self._apply("gather", items)

    def spread(self, rows: Tensor) -> Tensor:
        """Repeat each batch row's values for its positions, with gradient: [B, K] -> [N, K]."""
        return self._apply("spread", rows)

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the positions of each row, with gradient: [N, K] -> [B, K]."""
        return self._apply("sum", values)

    def dot(self, queries: Tensor, items: Tensor) -> Tensor:  # [B, D], [U, D] -> [N]
        """Return the dot product of each history item and its row's query, with both gradients."""
        return self._apply("dot", queries, items)

    def weighted_sum(self, weights: Tensor, items: Tensor) -> Tensor:  # [N], [U, D] -> [B, D]
        """Return the weighted sum of the items of each row, with both gradients."""
        return self._apply("weighted_sum", weights, items)

    def softmax(self, scores: Tensor) -> Tensor:
        """Return the softmax of [N, K] or [N] over the positions of each row."""
        columns = scores if scores.dim() == 2 else scores.unsqueeze(1)
        return self._apply("softmax", columns.contiguous()).view(scores.shape)

    def maximum(self, values: Tensor, if_empty: float) -> Tensor:
        """Return maxima of [N, K] by row: [B, K]; `if_empty` for an empty row."""
        detached = values.detach()
        # `unsafe` skips checks of the lengths, which would wait for a GPU.
        maxima = torch.segment_reduce(
            detached, "max", lengths=self.lengths, initial=if_empty, unsafe=True
        )
        if not values.requires_grad:
            return maxima
        # Equal maxima share the gradient; segment_reduce (torch 2.13) shares only positive ones.
        highest = (detached == self.spread(maxima)).to(values.dtype)  # [N, K]
        shares = highest / self.spread(self.sum(highest).clamp(min=1))
        return maxima + self.sum((values - detached) * shares)  # adds 0, but has the gradient

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """Pad [N] to [B, longest] with `fill`."""
        positions = self.positions - self.offsets[self.rows]
        padded = values.new_full((self.lengths.shape[0], self.longest), fill)
        return padded.index_put((self.rows, positions), values)


def _stable_order(numbers: Tensor, limit: int) -> Tensor:
    """Return `numbers.argsort(stable=True)` [N] of numbers [N] in [0, limit)."""
    if is_on_host(numbers) and limit <= 2**16:
        # numpy's radix sort of 16-bit numbers is ten times as fast as its sort of 64-bit numbers.
        return torch.from_numpy(np.argsort(numbers.numpy().astype(np.uint16), kind="stable"))
    return numbers.argsort(stable=True)


def _counts(numbers: Tensor, limit: int) -> Tensor:
    """Return `numbers.bincount(minlength=limit)`, numbers in [0, limit), without a GPU wait."""
    counts = torch.zeros(limit, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, numbers, torch.ones_like(numbers))


def _bag(index: Tensor, vectors: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Return weighted sums of vectors[index] [N, D] over the bags of offsets [B + 1]: [B, D]."""
    if not vectors.shape[1]:  # the kernel does not support width 0
        return vectors.new_zeros(offsets.shape[0] - 1, 0)
    return F.embedding_bag(
        index,
        vectors.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def _of_rows(history: JaggedHistory, rows: Tensor) -> Tensor:  # [B, K] -> [N, K]
    return rows.index_select(0, history.rows)


def _row_sums(history: JaggedHistory, values: Tensor) -> Tensor:  # [N, K] -> [B, K]
    return _bag(history.positions, values, history.offsets, None)


def _of_items(history: JaggedHistory, items: Tensor) -> Tensor:  # [U, K] -> [N, K]
    return items.index_select(0, history.index)


def _item_sums(history: JaggedHistory, values: Tensor) -> Tensor:  # [N, K] -> [U, K]
    order, _, offsets = history.by_item
    return _bag(order, values, offsets, None)


def _dot(history: JaggedHistory, queries: Tensor, items: Tensor) -> Tensor:
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        queries.contiguous(),
        items.contiguous(),
        history.index,
        history.offsets[:-1],
        history.rows,
        0,
    )


def _weighted_sum(history: JaggedHistory, weights: Tensor, items: Tensor) -> Tensor:
    return _bag(history.index, items, history.offsets, weights)


def _weighted_item_sums(history: JaggedHistory, weights: Tensor, rows: Tensor) -> Tensor:
    """Return sums of weights [N] times rows [B, D] over the positions of each item: [U, D]."""
    order, rows_by_item, offsets = history.by_item
    return _bag(rows_by_item, rows, offsets, weights[order])


def _multilinear(apply: Callable[..., Tensor], *gradients: Callable[..., Tensor]) -> Any:
    """Return the autograd function of a map that is linear in each input.

    Functions `gradients` take the output's gradient and, if there are several inputs, all inputs.
    """

    class Multilinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            *inputs, history = arguments
            ctx.history = history
            ctx.save_for_backward(*(inputs if len(inputs) > 1 else []))
            return apply(history, *inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            inputs = ctx.history, gradient, *ctx.saved_tensors
            pairs = zip(gradients, ctx.needs_input_grad)  # the history, last, has no gradient
            return *(function(*inputs) if use else None for function, use in pairs), None

    return Multilinear


class _Softmax(torch.autograd.Function):
    """Autograd of scores [N, K] -> softmax over the positions of each row [N, K]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, history: JaggedHistory) -> Tensor:
        ctx.history = history
        # FBGEMM has no kernel for float64, and its graph is valid for one value of `longest`.
        if scores.dtype == torch.float64 or isinstance(history.longest, torch.SymInt):
            shares = (scores - history.spread(history.maximum(scores, 0.0))).exp()
            softmax = shares / history.spread(history.sum(shares))
        else:
            softmax = torch.ops.fbgemm.jagged_softmax(scores, history.offsets, history.longest)[0]
        ctx.save_for_backward(softmax)
        return softmax

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (softmax,), history = ctx.saved_tensors, ctx.history
        # FBGEMM's backward has no derivative: autograd would silently use zero.
        is_symbolic = isinstance(history.longest, torch.SymInt)
        if torch.is_grad_enabled() or softmax.dtype == torch.float64 or is_symbolic:
            shares = gradient * softmax
            return shares - softmax * history.spread(history.sum(shares)), None
        backward = torch.ops.fbgemm.jagged_softmax_backward
        return backward(gradient, softmax, history.offsets, history.longest), None


# Keys are names, since torch.compile does not support types as keys.
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "gather": _multilinear(_of_items, _item_sums),
    "spread": _multilinear(_of_rows, _row_sums),
    "sum": _multilinear(_row_sums, _of_rows),
    "dot": _multilinear(
        _dot,
        lambda history, gradient, queries, items: _weighted_sum(history, gradient, items),
        lambda history, gradient, queries, items: _weighted_item_sums(history, gradient, queries),
    ),
    "weighted_sum": _multilinear(
        _weighted_sum,
        lambda history, gradient, weights, items: history.dot(gradient, items),
        lambda history, gradient, weights, items: _weighted_item_sums(history, weights, gradient),
    ),
    "softmax": _Softmax,
}


@torch.compiler.allow_in_graph
def _apply_in_graph(name: str, inputs: list[Tensor], *fields: Any) -> Tensor:
    """Apply a function that torch.compile does not trace, as it cannot for varying sizes."""
    result: Tensor = _FUNCTIONS[name].apply(*inputs, JaggedHistory(*fields))
    return result
