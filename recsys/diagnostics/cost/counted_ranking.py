"""FLOPs of any ranking model, counted by PyTorch in one run on random vectors.

The formulas of `recsys.diagnostics.cost.step_costs` know the default ranking model; others are run
once, with a batch of real ids and the vectors that tables and content branch would give it.

Shapes: B batch, U unique history items, N history items, D dimension, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.diagnostics.cost.work import Work, moved, times
from recsys.ranking.vectors import IDVectors

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm)


def _flops_of_addmm(
    added: Sequence[int], left: Sequence[int], right: Sequence[int], **_: object
) -> int:  # of shapes
    return 2 * left[0] * left[1] * right[1]


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which by itself knows of no products in place."""
    return FlopCounterMode(display=False, custom_mapping={aten.addmm_: _flops_of_addmm})


def counted_work(counter: FlopCounterMode) -> Work:
    """FLOPs of products of matrices, and of other operations that PyTorch counts."""
    counts = counter.get_flop_counts().get("Global", {})
    products = sum(counts.get(product, 0) for product in PRODUCTS)
    return Work(products=products, others=sum(counts.values()) - products)


def counted_ranking(
    ranking: nn.Module,
    pooled_dims: Sequence[int],
    id_dim: int,
    content: ContentSettings | None,
    batch: Batch,
) -> tuple[Work, Work]:
    """Forward and backward of one row of `batch`.

    Bytes are those of the inputs and weights alone.

    Args:
        ranking: with real weights.
        pooled_dims, id_dim: widths of the ID vectors, pooled ones in their order.
        content: settings of the content branch, if there is one.
        batch: without content.
    """
    ranking = deepcopy(ranking).train()  # its gradients are nobody's
    rows, unique = batch.batch_size, len(batch.history_items)
    pooled = [torch.randn(rows, dim, requires_grad=True) for dim in pooled_dims]
    target, history = (torch.randn(n, id_dim, requires_grad=True) for n in (rows, unique))
    vectors = [*pooled, target, history]
    of_content = None
    if content is not None:
        spaces = content.vector_dim // content.dim - 1
        of_content = ContentVectors(
            target=torch.randn(rows, content.dim, requires_grad=True),
            history=torch.randn(unique, content.dim, requires_grad=True),
            target_modalities=torch.randn(rows, spaces, content.dim, requires_grad=True),
            history_modalities=torch.randn(unique, spaces, content.dim),
        )
        vectors += [of_content.target, of_content.read_history()[0]]
    with flop_counter() as forward:
        scored = ranking(IDVectors(pooled, target, history), of_content, batch)
        logits = scored if isinstance(scored, torch.Tensor) else scored.logits
    with flop_counter() as backward:
        logits.sum().backward()
    inputs = moved(sum(vector.numel() for vector in vectors))
    weights = moved(sum(parameter.numel() for parameter in ranking.parameters()))
    share = 1 / rows
    return (
        times(counted_work(forward) + inputs + weights, share),
        times(counted_work(backward) + times(inputs + weights, 2), share),
    )
