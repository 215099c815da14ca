"""Initialises each modality's projection with the principal components of its encoder's outputs.

Shapes: S sampled items, E width of the encoder, D content dimension, K components.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import ModalitySettings
from recsys.content.branch import ContentBranch, Projection
from recsys.content.encoders.base import Encoder, mean_token
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_values import digests_of, is_mostly_equal, share_of_most_common
from recsys.distributed.gather import gather_rows
from recsys.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

SAMPLED_ITEMS = 4096
ITEMS_PER_CALL = 256
# Deviations below this share of the outputs' size are rounding: of float32, about a hundred times.
ROUNDING = 1e-5
LARGEST_SIZE = 10.0  # root mean square from which on the outputs of an encoder are scaled


@torch.no_grad()
def start_projections(
    branch: ContentBranch,
    store: ContentStore,
    ranks: Ranks,
    modalities: Collection[str] | None = None,
    trained: ItemCounts | None = None,
) -> None:
    """Set weights and biases from a sample of the items, equal on all ranks. A collective.

    `trained`, the training rows by item of rank 0, excludes items without rows.
    """
    ids = np.sort(store.items.ids)
    if trained is not None and (has_rows := trained.of(ids) > 0).any():
        ids = ids[has_rows]
    places = np.linspace(0, len(ids) - 1, min(len(ids), SAMPLED_ITEMS)).astype(int)
    sample = ranks.from_first(ids[places])
    share = np.array_split(sample, ranks.world_size)[ranks.rank]
    branch.eval()
    for name, encoder in branch.encoders.items():
        if modalities is not None and name not in modalities:
            continue
        projection = branch.projections[name]
        assert isinstance(encoder, Encoder) and isinstance(projection, Projection)
        outputs, digests = _mean_outputs(encoder, name, share, store, ranks)
        outputs = gather_rows(outputs, ranks.group)
        digests = [digest for rank_digests in ranks.gather(digests) for digest in rank_digests]
        if len(set(digests)) == 1:  # differences between the outputs are rounding
            outputs = outputs[:1].expand_as(outputs)
        start_at_components(projection, outputs)
        _warn_of_equal_items(store.kinds[name].modality, name, digests)
        for values in projection.state_dict().values():
            # The signs of components depend on the processor, so all ranks use those of rank 0.
            dist.broadcast(values, src=0, group=ranks.group)


def _mean_outputs(
    encoder: Encoder, name: str, ids: np.ndarray, store: ContentStore, ranks: Ranks
) -> tuple[Tensor, list[bytes]]:  # [share of S, E], of items with this modality; content's hashes
    parts = [torch.zeros(0, encoder.output_dim, device=ranks.device)]
    digests: list[bytes] = []
    for start in range(0, len(ids), ITEMS_PER_CALL):
        content = store.gather(ids[start : start + ITEMS_PER_CALL])[name]
        digests += digests_of(content)
        encoded = encoder.encode(content.to(ranks.device))
        parts.append(mean_token(encoded.values.float(), encoded.mask)[encoded.mask.any(dim=1)])
    return torch.cat(parts), digests


def _warn_of_equal_items(modality: ModalitySettings, name: str, digests: list[bytes]) -> None:
    share = share_of_most_common(digests)
    if not is_mostly_equal(share, len(digests)):
        return
    words, fix = "equal content", "choose a column in which items differ, or remove the modality"
    if modality.kind == "text":
        words = f"the same first {modality.max_length} tokens (max_length)"
        fix = f"raise content.modalities.{name}.max_length, or {fix}"
    logger.warning(
        f"modality '{name}' (column '{modality.column}'): {round(share * len(digests)):,} of "
        f"{len(digests):,} sampled items have {words}, which does not distinguish them; {fix}"
    )


def start_at_components(projection: Projection, outputs: Tensor) -> None:  # [S, E]
    """Set the first rows to the principal components; further ones keep their random start."""
    size = _size(outputs)
    if size > LARGEST_SIZE * outputs.shape[1] ** 0.5:
        center = outputs.double().mean(dim=0)
        spread = _size(outputs - center)
        scale = outputs.shape[1] ** 0.5 / (spread if spread > ROUNDING * size else size)
        projection.shift.copy_(center)
        projection.scale.fill_(scale)
        outputs, size = projection.scaled(outputs), size * scale
    if len(outputs) > 1:
        weight, bias = whitening_map(outputs, len(projection.weight), size)
        projection.weight[: len(weight)] = weight
        projection.bias[: len(bias)] = bias


def whitening_map(
    outputs: Tensor, dim: int, size: float
) -> tuple[Tensor, Tensor]:  # [S, E] -> [K, E], [K] with K = min(dim, S, E)
    """Return weight and bias that give the leading principal components mean 0 and variance 1.

    `size`, the root mean square length of the outputs before centring, decides what is rounding.
    """
    center = outputs.mean(dim=0)
    _, singular, directions = torch.linalg.svd(outputs - center, full_matrices=False)
    deviation = singular / len(outputs) ** 0.5
    precision = torch.finfo(outputs.dtype).eps * max(outputs.shape)
    rounding = max(ROUNDING * size, precision * float(deviation[0]))
    # Components of little variance stay small instead of being scaled up.
    scale = deviation.clamp(min=1e-3 * float(deviation[0]) + 1e-12)
    scale = torch.where(deviation > rounding, scale, max(size, 1.0))
    weight = directions[:dim] / scale[:dim].unsqueeze(1)
    return weight, -(weight @ center)


def _size(outputs: Tensor) -> float:  # [S, E]
    return float(outputs.double().norm()) / max(len(outputs), 1) ** 0.5
