"""DLRM, DLRM-DCNv2 and DeepFM built from TorchRec's modules; content joins the interacting vectors.

DLRM: Naumov et al. 2019, arXiv 1906.00091. DCN-v2: Wang et al. 2020, arXiv 2008.13535. DeepFM: Guo
et al. 2017, arXiv 1703.04247; TorchRec's version multiplies every two elements.
Shapes: B batch, D dimension, F fields, I = F * (F + 1) / 2 pairs, S similarities, C labels.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.models.deepfm import DenseArch as DeepFMDenseArch
from torchrec.models.dlrm import DenseArch, InteractionArch, InteractionDCNArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.deepfm import DeepFM as DeepComponent
from torchrec.modules.deepfm import FactorizationMachine

from recsys.config import ContentSettings
from recsys.content.dropout import Dropout
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.kernels import has_native, native_dot_interaction
from recsys.ranking.layers.fields import Fields
from recsys.ranking.layers.heads import hidden_layers
from recsys.ranking.settings import DeepFMSettings, DlrmDcnSettings, DlrmSettings
from recsys.ranking.vectors import IDVectors, InputDimensions


def dot_interaction(
    dense: Tensor,  # [B, D]
    sparse: Tensor,  # [B, F, D]
    pair_index: Tensor,  # [I], `pair_indices(F + 1)`
) -> Tensor:  # [B, D + I]
    """Return the dense vector, and the dot products of all pairs of dense and sparse vectors."""
    vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)  # [B, F + 1, D]
    products = torch.bmm(vectors, vectors.transpose(1, 2))
    return torch.cat([dense, products.flatten(1).index_select(1, pair_index)], dim=1)


def pair_indices(num_vectors: int) -> Tensor:
    """Return the indices of the pairs (i, j), i < j, in flattened products of all vectors."""
    pairs = torch.triu_indices(num_vectors, num_vectors, offset=1)
    return pairs[0] * num_vectors + pairs[1]


class DotInteraction(InteractionArch):
    """TorchRec's `InteractionArch` with one index per pair, which halves the time of its backward.

    Outputs and gradients equal TorchRec's bit by bit, or up to rounding if a kernel computes them.
    """

    places: Tensor
    kernel = "dot_interaction"

    def __init__(self, num_sparse_features: int) -> None:
        super().__init__(num_sparse_features)
        self.register_buffer("places", pair_indices(num_sparse_features + 1), persistent=False)

    def forward(
        self,
        dense_features: Tensor,  # [B, D]
        sparse_features: Tensor | list[Tensor],  # [B, F, D] as in TorchRec, or F tensors [B, D]
    ) -> Tensor:  # [B, D + I]
        tensors = sparse_features if isinstance(sparse_features, list) else [sparse_features]
        if has_native(dense_features, *tensors):
            return native_dot_interaction(dense_features, sparse_features)
        if isinstance(sparse_features, list):
            sparse_features = torch.stack(sparse_features, dim=1)
        return dot_interaction(dense_features, sparse_features, self.places)

    def kernel_refusal(self) -> str | None:
        return None  # a kernel computes any number of vectors


class CrossInteraction(InteractionDCNArch):
    """TorchRec's `InteractionDCNArch`, also of F tensors [B, D]."""

    def forward(self, dense_features: Tensor, sparse_features: Tensor | list[Tensor]) -> Tensor:
        if isinstance(sparse_features, list):
            sparse_features = torch.stack(sparse_features, dim=1)
        return super().forward(dense_features, sparse_features)


class Dlrm(nn.Module):
    """Fields -> dot products of all pairs, with dropout -> MLP -> one logit per label."""

    Settings: ClassVar[type[DlrmSettings]] = DlrmSettings

    def __init__(
        self, settings: DlrmSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__()
        if not settings.mlp_units:
            raise ValueError(
                f"ranking.mlp_units is empty, but the top MLP of {settings.name} has at least one "
                "hidden layer; give its units"
            )
        self.fields = Fields(dimensions, content)
        numbers, dim = self.fields.num_numbers, dimensions.id_dim
        self.dense_arch = DenseArch(numbers, [*settings.dense_units, dim]) if numbers else None
        self.inter_arch, width = self.interaction(self.fields.num_interacting, dim, settings)
        self.dropout = Dropout(settings.dropout)
        units = [*settings.mlp_units, dimensions.num_labels]
        self.over_arch = OverArch(width + self.fields.num_similarities, units)

    def interaction(
        self, num_fields: int, dim: int, settings: DlrmSettings
    ) -> tuple[nn.Module, int]:
        return DotInteraction(num_fields), dim + math.comb(num_fields + 1, 2)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Tensor:
        fields = self.fields(ids, content, batch)
        top = self.dropout(self.inter_arch(*fields.dense_and_sparse(self.dense_arch)))
        if fields.similarities.shape[1]:  # else a copy of the model's widest tensor, [B, pairs]
            top = torch.cat([top, fields.similarities], dim=1)
        return self.over_arch(top)


class DlrmDcn(Dlrm):
    """Fields -> `ranking.cross_layers` cross layers of rank `cross_rank` -> MLP -> logits."""

    Settings = DlrmDcnSettings

    def interaction(
        self, num_fields: int, dim: int, settings: DlrmSettings
    ) -> tuple[nn.Module, int]:
        assert isinstance(settings, DlrmDcnSettings)
        width = (num_fields + 1) * dim
        cross = LowRankCrossNet(width, settings.cross_layers, settings.cross_rank)
        return CrossInteraction(num_fields, cross), width


class DeepFM(nn.Module):
    """Fields -> factorisation machine beside an MLP -> one logit per label."""

    Settings = DeepFMSettings

    def __init__(
        self, settings: DeepFMSettings, dimensions: InputDimensions, content: ContentSettings | None
    ) -> None:
        super().__init__()
        if not settings.mlp_units or len(settings.dense_units) != 1:
            raise ValueError(
                f"ranking.mlp_units is {settings.mlp_units} and ranking.dense_units "
                f"{settings.dense_units}; deepfm has at least one layer of the first and exactly "
                "one of the second"
            )
        self.fields = Fields(dimensions, content)
        numbers, dim = self.fields.num_numbers, dimensions.id_dim
        units = settings.dense_units[0]
        self.dense_arch = DeepFMDenseArch(numbers, units, dim) if numbers else None
        width = (self.fields.num_interacting + 1) * dim + self.fields.num_similarities
        layers, width = hidden_layers(width, settings.mlp_units, settings.dropout)
        self.deep = DeepComponent(nn.Sequential(*layers))
        self.factorization_machine = FactorizationMachine()
        self.top = nn.Linear(dim + width + 1, dimensions.num_labels)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Tensor:
        fields = self.fields(ids, content, batch)
        dense, sparse = fields.dense_and_sparse(self.dense_arch)
        vectors = [dense, *sparse]
        deep = self.deep([*vectors, fields.similarities])
        pairs = self.factorization_machine(vectors)  # [B, 1]
        return self.top(torch.cat([dense, deep, pairs], dim=1))
