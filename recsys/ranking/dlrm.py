"""DLRM and DLRM-DCNv2 built from TorchRec's modules; content joins the interacting vectors.

DLRM (Naumov et al. 2019, arXiv 1906.00091) takes the dot products of all pairs of vectors,
DLRM-DCNv2, the MLPerf model, puts a low-rank cross network (Wang et al. 2020, arXiv 2008.13535) in
their place. The ID-only twin computes what `torchrec.models.dlrm.DLRM` or `DLRM_DCN` would from the
same vectors (DLRM to the last bit with `kernels: torch`), and `dense_arch`, `inter_arch` and
`over_arch` have the names of its parameters. Content adds two vectors to the interaction and its
similarities to the top.

Shapes: B batch, D dimension, F fields, S similarities, C labels.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionDCNArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.config import ContentSettings
from recsys.content.dropout import Dropout
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.dot_interaction import DotInteraction
from recsys.ranking.layers.fields import Fields
from recsys.ranking.settings import DlrmDcnSettings, DlrmSettings
from recsys.ranking.vectors import IDVectors


class Dlrm(nn.Module):
    """Fields -> dot products of all pairs -> MLP -> one logit per label.

    `ranking.dropout` acts on the interactions that the top MLP reads, not on the similarities.

    Raises:
        ValueError: `ranking.mlp_units` is empty.
    """

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
        self.over_arch = OverArch(
            width + self.fields.num_similarities, [*settings.mlp_units, dimensions.num_labels]
        )

    def interaction(
        self, num_fields: int, dim: int, settings: DlrmSettings
    ) -> tuple[nn.Module, int]:
        """Return the module that combines the dense vector with F fields, and its output width.

        Args:
            num_fields: F.
            dim: D.
            settings: settings of the model, read by subclasses.
        """
        return DotInteraction(num_fields), dim + math.comb(num_fields + 1, 2)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor:  # [B, C]
        """Return the logits of a batch."""
        fields = self.fields(ids, content, batch)
        dense, sparse = fields.dense_and_sparse(self.dense_arch)
        top = self.dropout(self.interact(dense, sparse))
        if fields.similarities.shape[1]:  # else a copy of the model's widest tensor, [B, pairs]
            top = torch.cat([top, fields.similarities], dim=1)
        return self.over_arch(top)

    def interact(self, dense: Tensor, sparse: list[Tensor]) -> Tensor:
        """Return the interactions of the dense vector [B, D] and F fields [B, D]."""
        interactions: Tensor = self.inter_arch(dense, sparse)
        return interactions


class DlrmDcn(Dlrm):
    """Fields -> `ranking.cross_layers` cross layers of rank `cross_rank` -> MLP -> logits."""

    Settings = DlrmDcnSettings

    def interaction(
        self, num_fields: int, dim: int, settings: DlrmSettings
    ) -> tuple[nn.Module, int]:
        """Return a low-rank cross network over the dense vector and F fields, and its width."""
        assert isinstance(settings, DlrmDcnSettings)
        width = (num_fields + 1) * dim
        cross = LowRankCrossNet(width, settings.cross_layers, settings.cross_rank)
        return InteractionDCNArch(num_fields, cross), width

    def interact(self, dense: Tensor, sparse: list[Tensor]) -> Tensor:
        """Return the crossed dense vector [B, D] and F fields [B, D], side by side."""
        interactions: Tensor = self.inter_arch(dense, torch.stack(sparse, dim=1))
        return interactions
