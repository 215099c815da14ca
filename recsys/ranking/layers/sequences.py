"""Histories as sequences of tokens: flat for linear maps, padded for attention among a row's items.

Keys [T, H * D] are a table of T * H rows of width D: head h of token t is row t * H + h.
Shapes: B rows, S sequences (B, or 1 shared by all rows), T tokens of all sequences, L longest
sequence, U unique items, N positions of all rows (T, or B * L if rows share a sequence), H heads,
D width of all heads (of one head where it is H * D), K any width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from embeddings.host import is_on_host
from recsys.data.jagged_history import JaggedHistory


def _dots(history: JaggedHistory, queries: Tensor, table: Tensor, heads: int) -> Tensor:
    """Return dot products [H, T] of rows [B, H * D] and tokens [T, H * D]."""
    split, offsets = table.view(-1, table.shape[1] // heads), history.offsets[:-1]
    head_dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
    dots = []
    for head, query in enumerate(queries.chunk(heads, dim=1)):
        index = history.index * heads + head
        dots.append(head_dots(query.contiguous(), split, index, offsets, history.rows, 0))
    return torch.stack(dots)


def _sums(history: JaggedHistory, weights: Tensor, table: Tensor) -> Tensor:
    """Return sums [B, H * D] of tokens [T, H * D] with weights [H, T]."""
    heads, sums = weights.shape[0], []
    split = table.view(-1, table.shape[1] // heads)
    bag = partial(F.embedding_bag, mode="sum", include_last_offset=True)
    for head, head_weights in enumerate(weights.contiguous()):
        index = history.index * heads + head
        sums.append(bag(index, split, history.offsets, per_sample_weights=head_weights))
    return torch.cat(sums, dim=1)


def _products(history: JaggedHistory, vectors: Tensor, weights: Tensor) -> Tensor:
    """Return the row [B, H * D] of each token times its weights [H, T]: [T, H * D]."""
    products = vectors.index_select(0, history.rows)
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
        query_gradient = _sums(ctx.history, gradient, keys)
        return query_gradient, _products(ctx.history, queries, gradient), None, None


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
        weight_gradient = _dots(ctx.history, gradient, values, weights.shape[0])
        return weight_gradient, _products(ctx.history, gradient, weights), None


Attention = Callable[[Tensor], Tensor]  # [S, L, K] -> [S, L, D]
BLOCK_CELLS = 2**20  # pairs of positions, whose scores fit a cache
CELL_BYTES = 320  # 4 bytes * 5 tensors * 4 heads * 4, to fill a quarter of a GPU's memory


@torch.compiler.assume_constant_result
def _cells_on_gpu() -> int:
    if not torch.cuda.is_available():
        return BLOCK_CELLS
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.total_memory // CELL_BYTES


def build_sequences(history: Any) -> Sequences:
    """Return the sequences of a `JaggedHistory`, or of the history that candidates share."""
    if isinstance(history, JaggedHistory):
        return JaggedSequences(history.unindexed())
    if history.is_shared:
        return EqualSequences(history)
    rows, longest = history.num_rows, history.longest
    indices = torch.arange(rows * longest, device=history.device).view(rows, longest)
    return EqualSequences(replace(history, num_items=rows * longest, indices=indices))


@dataclass
class JaggedSequences:
    """Sequences of different lengths, one per row."""

    history: JaggedHistory  # over T tokens
    indices: Tensor | None = None  # int64, the tokens that `latest` chose; None: all

    def tokens(self, items: Tensor, history: JaggedHistory) -> Tensor:  # [U, K] -> [T, K]
        return history.gather(items)

    def per_token(self, values: Tensor) -> Tensor:  # [N, K] -> [T, K]
        return values  # each position of a row is a token

    def ages(self) -> Tensor:  # int64 [T]: the number of newer tokens of the same row
        return self.history.ages

    def padded(self, tokens: Tensor) -> Tensor:  # [T, K] -> [B, L, K], zero after the last token
        offsets, longest = [self.history.offsets], [self.history.longest]
        return torch.ops.fbgemm.jagged_to_padded_dense(tokens, offsets, longest, 0.0)

    def flat(self, padded: Tensor) -> Tensor:  # [B, L, K] -> [T, K]
        offsets, total = [self.history.offsets], len(self.history.index)
        return torch.ops.fbgemm.dense_to_jagged(padded, offsets, total)[0]

    def attend(self, tokens: Tensor, attention: Attention, recomputes: bool) -> Tensor:
        """Map tokens [T, K] -> [T, D] by causal attention; `recomputes` saves its memory."""
        padded, lengths = self.padded(tokens), self.history.lengths
        longest = padded.shape[1]
        cells = BLOCK_CELLS if is_on_host(padded) else _cells_on_gpu()
        order, size = lengths.argsort(), max(cells // longest**2, 1)
        if len(order) <= size:
            return self.flat(attention(padded))
        ordered = None if self.history.host_lengths is None else np.sort(self.history.host_lengths)
        blocks = []
        for number, rows in enumerate(order.split(size)):
            last = min((number + 1) * size, len(order)) - 1
            block_length = longest  # if lengths are on a GPU alone: the host does not wait for it
            if ordered is not None:
                block_length = int(ordered[last])
            elif is_on_host(lengths):
                block_length = int(lengths[rows[-1]])
            block = padded[rows, : max(block_length, 1)]
            if recomputes and torch.is_grad_enabled():
                attended = checkpoint(attention, block, use_reentrant=False)
            else:
                attended = attention(block)
            blocks.append(F.pad(attended, (0, 0, 0, longest - attended.shape[1])))
        return self.flat(torch.cat(blocks)[order.argsort()])

    def dots(self, queries: Tensor, keys: Tensor, heads: int) -> Tensor:  # [B, D], [T, D] -> [H, T]
        return _Dots.apply(queries, keys, self.history, heads)

    def sums(self, weights: Tensor, values: Tensor) -> Tensor:  # [H, T], [T, D] -> [B, D]
        return _Sums.apply(weights, values, self.history)

    def at_positions(self, values: Tensor) -> Tensor:  # [H, T] -> [H, N]
        return values  # each token has one position

    def latest(self, count: int) -> JaggedSequences:
        if self.history.longest <= count:
            return JaggedSequences(self.history)
        indices = self.history.newest(count)
        history = self.history.select(indices, count).unindexed()
        return JaggedSequences(replace(history, longest=count), indices)

    def take_latest(self, tokens: Tensor, latest: Sequences) -> Tensor:
        assert isinstance(latest, JaggedSequences)
        return tokens if latest.indices is None else tokens.index_select(0, latest.indices)

    def put_latest(self, tokens: Tensor, latest_tokens: Tensor, latest: Sequences) -> Tensor:
        assert isinstance(latest, JaggedSequences)
        if latest.indices is None:
            return latest_tokens
        return tokens.index_copy(0, latest.indices, latest_tokens.to(tokens.dtype))


@dataclass
class EqualSequences:
    """Sequences of one length: one that all candidates share, or one per row after a search."""

    history: Any  # a `SharedHistory` over the tokens

    @property
    def count(self) -> int:  # S
        return 1 if self.history.is_shared else self.history.num_rows

    def tokens(self, items: Tensor, history: Any) -> Tensor:  # [U, K] -> [T, K]
        return items if history.is_shared else history.gather(items)

    def per_token(self, values: Tensor) -> Tensor:  # [N, K] -> [T, K]
        return self.history.of_one_row(values) if self.history.is_shared else values

    def ages(self) -> Tensor:
        longest = self.history.longest
        ages = longest - 1 - torch.arange(longest, device=self.history.device)
        return ages.repeat(self.count)

    def padded(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(self.count, self.history.longest, tokens.shape[1])

    def flat(self, padded: Tensor) -> Tensor:
        return padded.reshape(self.count * self.history.longest, padded.shape[2])

    def attend(self, tokens: Tensor, attention: Attention, recomputes: bool) -> Tensor:
        return self.flat(attention(self.padded(tokens)))

    def dots(self, queries: Tensor, keys: Tensor, heads: int) -> Tensor:
        pairs = zip(queries.chunk(heads, dim=1), keys.chunk(heads, dim=1))
        return torch.stack([self.history.dot(query, key) for query, key in pairs])

    def sums(self, weights: Tensor, values: Tensor) -> Tensor:
        pairs = zip(weights, values.chunk(weights.shape[0], dim=1))
        return torch.cat([self.history.weighted_sum(*pair) for pair in pairs], dim=1)

    def at_positions(self, values: Tensor) -> Tensor:  # [H, T] -> [H, N], each position's token
        return self.history.gather(values.T).T

    def latest(self, count: int) -> EqualSequences:
        length = torch.sym_min(self.history.longest, count)
        indices = None
        if not self.history.is_shared:
            numbers = torch.arange(self.count * length, device=self.history.device)
            indices = numbers.view(self.count, length)
        return EqualSequences(replace(self.history, num_items=self.count * length, indices=indices))

    def take_latest(self, tokens: Tensor, latest: Sequences) -> Tensor:
        older = self.history.longest - latest.history.longest
        return self.padded(tokens)[:, older:].reshape(-1, tokens.shape[1])

    def put_latest(self, tokens: Tensor, latest_tokens: Tensor, latest: Sequences) -> Tensor:
        older = self.history.longest - latest.history.longest
        padded = [self.padded(tokens)[:, :older], latest.padded(latest_tokens)]
        return self.flat(torch.cat(padded, dim=1))


Sequences = JaggedSequences | EqualSequences
