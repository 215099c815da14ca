"""The interactions of torchrec.models.dlrm with K more vectors in them.

Each does what its original does for F + K sparse features, in two parts: the original's own output,
to the bit while the new weights are at their start, and the columns that come with the K vectors,
which the over arch gets through weights that start at zero. All of them read the original through
its public parts and change nothing in it.

Shapes: B batch, F sparse features, K content vectors, D dimension, I columns of the original, J new
columns, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.models.dlrm import (
    InteractionArch,
    InteractionDCNArch,
    InteractionProjectionArch,
)
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.plug_in.added_columns import AddedColumns, no_columns


class WidenedInteraction(nn.Module):
    """(dense [B, D], sparse [B, F, D], vectors [B, K, D]) -> ([B, I], [B, J])."""

    num_columns: int  # J


class DotProducts(WidenedInteraction):
    """DLRM: the dot products of each content vector with dense, sparse and other content vectors.

    The original's rule for F + K features, of which the pairs without content are its own output.
    """

    left: Tensor
    right: Tensor

    def __init__(self, original: InteractionArch, num_vectors: int) -> None:
        super().__init__()
        self._original = (original,)
        known = original.F + 1
        pairs = torch.triu_indices(known + num_vectors, known + num_vectors, offset=1)
        pairs = pairs[:, pairs[1] >= known]
        self.register_buffer("left", pairs[0], persistent=False)
        self.register_buffer("right", pairs[1] - known, persistent=False)
        self.num_columns = pairs.shape[1]

    def forward(self, dense: Tensor, sparse: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        everything = torch.cat([dense.unsqueeze(1), sparse, vectors], dim=1)  # [B, 1 + F + K, D]
        products = everything @ vectors.transpose(1, 2)  # [B, 1 + F + K, K]
        return self._original[0](dense, sparse), products[:, self.left, self.right]


class CrossNet(WidenedInteraction):
    """DLRM_DCN: the low-rank cross net (DCN-v2, arXiv 2008.13535) over (F + 1 + K) * D columns.

    Each layer is x0 * (W V x + b) + x with W [columns, R] and V [R, columns]. The rows of W and b
    for content start as TorchRec's, the columns of V for content at zero, so that nothing of
    content reaches the original's columns until they have learned to take it.

    Raises:
        ValueError: the cross net is of another class.
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
        self.num_columns = num_vectors * dim
        self.added = LowRankCrossNet(
            self.num_columns, len(crossnet.bias), crossnet.V_kernels[0].shape[0]
        )
        for kernel in self.added.V_kernels:
            nn.init.zeros_(kernel)

    def forward(self, dense: Tensor, sparse: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        net, added = self._crossnet[0], self.added
        first = torch.cat([dense.unsqueeze(1), sparse], dim=1).flatten(1)  # [B, (1 + F) * D]
        first_added = vectors.flatten(1)  # [B, K * D]
        x, x_added = first, first_added
        for layer in range(len(net.bias)):
            low = F.linear(x, net.V_kernels[layer])  # [B, R]
            low = low + F.linear(x_added, added.V_kernels[layer])
            x = first * (F.linear(low, net.W_kernels[layer]) + net.bias[layer]) + x
            x_added = (
                first_added * (F.linear(low, added.W_kernels[layer]) + added.bias[layer]) + x_added
            )
        return x, x_added


class Projections(WidenedInteraction):
    """DLRM_Projection: both branches see the content vectors; the number of columns stays."""

    def __init__(self, original: InteractionProjectionArch, num_vectors: int, dim: int) -> None:
        super().__init__()
        self._original = (original,)
        self.branch1 = AddedColumns(original.interaction_branch1, num_vectors * dim)
        self.branch2 = AddedColumns(original.interaction_branch2, num_vectors * dim)
        self.num_columns = 0

    def forward(self, dense: Tensor, sparse: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        added = vectors.flatten(1)
        with self.branch1.added(added), self.branch2.added(added):
            return self._original[0](dense, sparse), no_columns(dense)


def widened_interaction(original: nn.Module, num_vectors: int, dim: int) -> WidenedInteraction:
    """Return the interaction of a DLRM with room for K content vectors.

    Raises:
        ValueError: an interaction that is none of torchrec.models.dlrm.
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
