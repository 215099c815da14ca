"""Counts the FLOPs of `recsys.kernels` in a ranking model, for PyTorch's counter of operations.

A kernel is one operation to PyTorch, whose FLOPs it does not know. The numbers are those of the
least that the kernel's mathematics needs: a backward that computes units again does not count them.

Shapes: B batch, U unique items, N history items, D dimension, H and G units of the two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import recsys.kernels  # noqa: F401  defines the operators


def _target_attention(target: Sequence[int], *shapes: Any, **_: Any) -> int:
    """Count both layers and the weighted sum of places, and the first matrix of rows."""
    rows, dim = target
    places, hidden, units = shapes[1][0], shapes[5][0], shapes[7][0]
    of_place = dim * hidden + hidden * units + units + dim
    return int(2 * places * of_place + 4 * rows * dim * hidden)


def _dot_interaction(dense: Sequence[int], sparse: Sequence[Sequence[int]], **_: Any) -> int:
    """Count the dot products of all pairs of vectors."""
    rows, dim = dense
    features = sum(shape[1] if len(shape) == 3 else 1 for shape in sparse)
    return rows * features * (features + 1) * dim


def kernel_counts() -> dict[Any, Callable[..., int]]:
    """Return the function that counts each kernel's FLOPs, for `FlopCounterMode`.

    A backward computes the gradients of both factors of each product; the forward's inputs follow
    its gradient and what the forward kept.
    """
    ops = torch.ops.recsys
    return {
        ops.target_attention: _target_attention,
        ops.target_attention_backward: lambda *shapes, **_: 2 * _target_attention(*shapes[3:]),
        ops.dot_interaction: _dot_interaction,
        ops.dot_interaction_backward: lambda *shapes, **_: 2 * _dot_interaction(*shapes[1:]),
    }
