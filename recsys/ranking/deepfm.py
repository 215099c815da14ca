"""DeepFM (Guo et al. 2017, arXiv 1703.04247) built from TorchRec's modules, with content.

A factorisation machine and an MLP read the same vectors, and a linear layer reads both outputs.
The ID-only twin with one layer of `mlp_units` computes what `torchrec.models.deepfm.SimpleDeepFMNN`
would from the same vectors, as logits instead of probabilities. TorchRec's factorisation machine
multiplies every two elements of all vectors, not only those at the same place as in the paper.

Shapes: B batch, D dimension, F fields, S similarities, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.models.deepfm import DenseArch
from torchrec.modules.deepfm import DeepFM as DeepComponent
from torchrec.modules.deepfm import FactorizationMachine

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.dimensions import InputDimensions
from recsys.ranking.layers.fields import Fields
from recsys.ranking.layers.mlp import hidden_layers
from recsys.ranking.settings import DeepFMSettings
from recsys.ranking.vectors import IDVectors


class DeepFM(nn.Module):
    """Fields -> factorisation machine beside an MLP -> one logit per label.

    The MLP also reads the similarities of content, and `ranking.dropout` acts on its hidden layers.

    Raises:
        ValueError: `ranking.mlp_units` is empty, or `ranking.dense_units` not one layer.
    """

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
        self.dense_arch = DenseArch(numbers, settings.dense_units[0], dim) if numbers else None
        width = (self.fields.num_interacting + 1) * dim + self.fields.num_similarities
        layers, width = hidden_layers(width, settings.mlp_units, settings.dropout)
        self.deep = DeepComponent(nn.Sequential(*layers))
        self.factorization_machine = FactorizationMachine()
        self.top = nn.Linear(dim + width + 1, dimensions.num_labels)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor:  # [B, C]
        """Return the logits of a batch."""
        fields = self.fields(ids, content, batch)
        dense, sparse = fields.dense_and_sparse(self.dense_arch)
        vectors = [dense, *sparse]
        deep = self.deep([*vectors, fields.similarities])
        pairs = self.factorization_machine(vectors)  # [B, 1]
        return self.top(torch.cat([dense, deep, pairs], dim=1))
