"""Initialises each modality's projection with the principal components of its encoder's outputs.

A random map to a few dimensions loses most of the information in a pretrained encoder's output,
cosines included; the leading components, scaled to unit variance, keep as much as a linear map can.
Training continues from there.

Shapes: S sampled items, E width of the encoder, D content dimension,
K components.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.content.branch import ContentBranch
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.pooling import mean_token
from recsys.data.items.content_store import ContentStore
from recsys.distributed.gather import gather_rows
from recsys.distributed.ranks import Ranks

SAMPLED_ITEMS = 4096
ITEMS_PER_CALL = 256


@torch.no_grad()
def start_projections(branch: ContentBranch, store: ContentStore, ranks: Ranks) -> None:
    """Set weights and biases from a sample of the items, equal on all ranks. A collective."""
    ids = np.sort(store.items.ids)
    sample = ids[np.linspace(0, len(ids) - 1, min(len(ids), SAMPLED_ITEMS)).astype(int)]
    share = np.array_split(sample, ranks.world_size)[ranks.rank]
    branch.eval()
    for name, encoder in branch.encoders.items():
        projection = branch.projections[name]
        assert isinstance(encoder, Encoder) and isinstance(projection, nn.Linear)
        outputs = gather_rows(_mean_outputs(encoder, name, share, store, ranks), ranks.group)
        if len(outputs) > 1:
            weight, bias = whitening_map(outputs, len(projection.weight))
            projection.weight[: len(weight)] = weight
            projection.bias[: len(bias)] = bias
        for parameter in (projection.weight, projection.bias):
            # The signs of components depend on the processor, so all ranks use those of rank 0.
            dist.broadcast(parameter.data, src=0, group=ranks.group)


def _mean_outputs(
    encoder: Encoder,
    name: str,
    ids: np.ndarray,  # [share of S]
    store: ContentStore,
    ranks: Ranks,
) -> Tensor:  # [S, E], items that have this modality
    parts = [torch.zeros(0, encoder.output_dim, device=ranks.device)]
    for start in range(0, len(ids), ITEMS_PER_CALL):
        content = store.gather(ids[start : start + ITEMS_PER_CALL])[name]
        encoded = encoder.encode(content.to(ranks.device))
        parts.append(mean_token(encoded.values, encoded.mask)[encoded.mask.any(dim=1)])
    return torch.cat(parts)


def whitening_map(
    outputs: Tensor,  # [S, E]
    dim: int,
) -> tuple[Tensor, Tensor]:  # [K, E], [K] with K = min(dim, S, E)
    """Return weight and bias that give the leading principal components mean 0 and variance 1."""
    center = outputs.mean(dim=0)
    _, singular, directions = torch.linalg.svd(outputs - center, full_matrices=False)
    deviation = singular / len(outputs) ** 0.5
    # Components without variance stay small instead of being scaled up.
    deviation = deviation.clamp(min=1e-3 * float(deviation[0]) + 1e-12)
    weight = directions[:dim] / deviation[:dim].unsqueeze(1)
    return weight, -(weight @ center)
