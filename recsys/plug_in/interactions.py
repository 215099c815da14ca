"""Interactions of torchrec.models.dlrm with K more vectors as inputs.

A first layer y = W x + b gets inputs z as y = W x + V z + b, where V starts at zero.
Shapes: B batch, F sparse features, K content vectors, D dimension, I columns of the original, J new
columns, R rank, X columns of a module's own input, Z added columns, O outputs of its first layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.models.dlrm import InteractionArch, InteractionDCNArch, InteractionProjectionArch
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.ranking.dlrm import dot_interaction, pair_indices


class WidenedLinear(nn.Linear):
    """A linear layer that adds `extra` [B, O] to its output while it is set."""

    extra: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, X] -> [B, O]
        output = super().forward(x)
        return output if self.extra is None else output + self.extra


class AddedColumns(nn.Module):
    """Columns [B, Z] beside the inputs of a module's first linear layer; weights start at zero."""

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        layer = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
        is_plain = type(layer) in (nn.Linear, WidenedLinear) and not hasattr(module, "_orig_mod")
        if layer is None or not is_plain:
            raise ValueError(
                f"{type(module).__name__} has no linear layer that content could be added to; "
                "give a DLRM as torchrec builds it, and compile it afterwards"
            )
        layer.__class__ = WidenedLinear  # the same object, so that its names stay
        self._layer = (cast(WidenedLinear, layer),)  # a tuple, so that it is no child of this one
        self.map = nn.Linear(width, layer.out_features, bias=False)
        nn.init.zeros_(self.map.weight)

    @contextmanager
    def added(self, columns: Tensor) -> Iterator[None]:  # columns: [B, Z]
        self._layer[0].extra = self.map(columns)
        try:
            yield
        finally:
            self._layer[0].extra = None


class WidenedModule(nn.Module):
    """A module called with added columns [B, Z]; with Z = 0 the output is its own."""

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self._module = (module,)
        self.columns = AddedColumns(module, width) if width else None

    def forward(self, x: Tensor, columns: Tensor) -> Tensor:  # [B, X], [B, Z] -> output [B, ...]
        with self.columns.added(columns) if self.columns is not None else nullcontext():
            output: Tensor = self._module[0](x)
        return output


class DotProducts(nn.Module):
    """DLRM: the dot products of each content vector with dense, sparse and content vectors."""

    pairs: Tensor
    places: Tensor

    def __init__(self, original: InteractionArch, num_vectors: int) -> None:
        super().__init__()
        self._original = (original,)
        self.is_plain = type(original).forward is InteractionArch.forward
        num_original = original.F + 1
        pairs = torch.triu_indices(num_original + num_vectors, num_original + num_vectors, offset=1)
        rows, columns = pairs[:, pairs[1] >= num_original]
        places = rows * num_vectors + columns - num_original
        self.register_buffer("pairs", pair_indices(num_original), persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.num_columns = len(rows)

    def forward(self, dense: Tensor, sparse: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        all_vectors = torch.cat([dense.unsqueeze(1), sparse, vectors], dim=1)  # [B, 1 + F + K, D]
        products = all_vectors @ vectors.transpose(1, 2)  # [B, 1 + F + K, K]
        content_columns = products.flatten(1).index_select(1, self.places)
        if self.is_plain:
            return dot_interaction(dense, sparse, self.pairs), content_columns
        return self._original[0](dense, sparse), content_columns  # a subclass of the user's


class CrossNet(nn.Module):
    """DLRM_DCN: the low-rank cross net (DCN-v2, arXiv 2008.13535) over (F + 1 + K) * D columns.

    A layer is x0 * (W V x + b) + x, W [columns, R], V [R, columns]. New columns of V start at 0.
    """

    def __init__(self, original: InteractionDCNArch, num_vectors: int, dim: int) -> None:
        super().__init__()
        crossnet = original.crossnet
        if not isinstance(crossnet, LowRankCrossNet):
            raise ValueError(
                f"the DLRM_DCN has a {type(crossnet).__name__}; content can be added to a "
                "LowRankCrossNet, as DLRM_DCN makes it"
            )
        self._crossnet = (crossnet,)
        self.num_columns, rank = num_vectors * dim, crossnet.V_kernels[0].shape[0]
        self.added = LowRankCrossNet(self.num_columns, len(crossnet.bias), rank)
        for kernel in self.added.V_kernels:
            nn.init.zeros_(kernel)

    def forward(self, dense: Tensor, sparse: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        net, content_net = self._crossnet[0], self.added
        x0 = torch.cat([dense.unsqueeze(1), sparse], dim=1).flatten(1)  # [B, (1 + F) * D]
        x0_added = vectors.flatten(1)  # [B, K * D]
        x, x_added = x0, x0_added
        for layer in range(len(net.bias)):
            reduced = F.linear(x, net.V_kernels[layer])  # [B, R]
            reduced = reduced + F.linear(x_added, content_net.V_kernels[layer])
            x = x0 * (F.linear(reduced, net.W_kernels[layer]) + net.bias[layer]) + x
            crossed = F.linear(reduced, content_net.W_kernels[layer]) + content_net.bias[layer]
            x_added = x0_added * crossed + x_added
        return x, x_added


class Projections(nn.Module):
    """DLRM_Projection: both branches get the content vectors; the number of columns stays."""

    def __init__(self, original: InteractionProjectionArch, num_vectors: int, dim: int) -> None:
        super().__init__()
        self._original = (original,)
        self.branch1 = AddedColumns(original.interaction_branch1, num_vectors * dim)
        self.branch2 = AddedColumns(original.interaction_branch2, num_vectors * dim)
        self.num_columns = 0

    def forward(self, dense: Tensor, sparse: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        content_columns = vectors.flatten(1)
        with self.branch1.added(content_columns), self.branch2.added(content_columns):
            return self._original[0](dense, sparse), dense.new_zeros(len(dense), 0)


def widened_interaction(
    original: nn.Module, num_vectors: int, dim: int
) -> DotProducts | CrossNet | Projections:
    """Return the interaction of a DLRM, extended by K content vectors, with J new columns.

    It maps (dense [B, D], sparse [B, F, D], vectors [B, K, D]) to ([B, I], [B, J]).
    """
    if isinstance(original, InteractionArch):
        return DotProducts(original, num_vectors)
    if isinstance(original, InteractionDCNArch):
        return CrossNet(original, num_vectors, dim)
    if isinstance(original, InteractionProjectionArch):
        return Projections(original, num_vectors, dim)
    raise ValueError(
        f"content cannot be added to an interaction of class {type(original).__name__}; the DLRM "
        "must be torchrec's DLRM, DLRM_DCN or DLRM_Projection, and not compiled yet"
    )
