"""TorchRec's dot interaction with one index per pair, which halves the time of its backward.

`torchrec.models.dlrm.InteractionArch` selects the pairs of fields from the products [B, F + 1,
F + 1] with a pair of index tensors, one for rows and one for columns. The backward of such a
selection is `index_put` with accumulation, one of the slowest operations of a DLRM's step on CPU.
`index_select` on the flattened products gives the same outputs and gradients to the last bit.

Upstream could do the same: register `triu_indices[0] * (F + 1) + triu_indices[1]` as the buffer,
and replace `interactions[:, triu_indices[0], triu_indices[1]]` by
`interactions.flatten(1).index_select(1, places)`.

`DotInteraction` computes by a kernel where `recsys.kernels` has one, which equals this reference to
rounding.

Shapes: B batch, F sparse features, D dimension, I = F * (F + 1) / 2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.models.dlrm import InteractionArch

from recsys.kernels import has_native, native_dot_interaction


def dot_interaction(
    dense: Tensor,  # [B, D]
    sparse: Tensor,  # [B, F, D]
    places: Tensor,  # [I], `pair_places(F + 1)`
) -> Tensor:  # [B, D + I]
    """Return the dense vector, and the dot products of all pairs of dense and sparse vectors."""
    vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)  # [B, F + 1, D]
    products = torch.bmm(vectors, vectors.transpose(1, 2))
    return torch.cat([dense, products.flatten(1).index_select(1, places)], dim=1)


def pair_places(num_vectors: int) -> Tensor:
    """Return the places of the pairs (i, j), i < j, in flattened products of all vectors."""
    pairs = torch.triu_indices(num_vectors, num_vectors, offset=1)
    return pairs[0] * num_vectors + pairs[1]


class DotInteraction(InteractionArch):
    """Replacement for TorchRec's `InteractionArch`, without parameters as that.

    Args:
        num_sparse_features: F.
    """

    places: Tensor

    def __init__(self, num_sparse_features: int) -> None:
        super().__init__(num_sparse_features)
        self.register_buffer("places", pair_places(num_sparse_features + 1), persistent=False)

    def forward(
        self,
        dense_features: Tensor,  # [B, D]
        sparse_features: Tensor | list[Tensor],  # [B, F, D] as in TorchRec, or F tensors [B, D]
    ) -> Tensor:  # [B, D + I]
        """Return the dense vector, and the dot products of all pairs of vectors."""
        parts = sparse_features if isinstance(sparse_features, list) else [sparse_features]
        if has_native(dense_features, *parts):
            return native_dot_interaction(dense_features, sparse_features)
        sparse = (
            torch.stack(sparse_features, dim=1)
            if isinstance(sparse_features, list)
            else sparse_features
        )
        return dot_interaction(dense_features, sparse, self.places)
