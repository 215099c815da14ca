"""Content of items outside of training steps: initialises projections, fills the bank, scores.

A projection starts with the principal components of its encoder's outputs.
Shapes: U items, N items with a row in the files, S cached vectors or sampled items, V width of a
vector, E width of the encoder, D content dimension, K components.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.host import is_host
from recsys.config import ModalitySettings
from recsys.content.branch import ContentBranch, Projection
from recsys.content.encoders.base import Encoder, mean_token
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_values import digests_of, is_mostly_equal, share_of_most_common
from recsys.data.items.kind import ContentInput
from recsys.distributed.gather import gather_rows
from recsys.distributed.ranks import Ranks

if TYPE_CHECKING:
    from recsys.data.batch import Batch

logger = logging.getLogger(__name__)

MAX_CACHE_BYTES = 2**28
ITEMS_PER_CALL, SCORED_ITEMS_PER_CALL = 256, 1024


def items_per_fill(device: torch.device) -> int:
    """Return the number of items of a call that fills the bank: more on a GPU, to keep it busy."""
    return ITEMS_PER_CALL if is_host(device) else SCORED_ITEMS_PER_CALL


class ItemVectorCache:
    """Gives batches the content vectors of their items; caches `max_bytes` of constant vectors."""

    def __init__(
        self,
        branch: ContentBranch,
        store: ContentStore,
        device: torch.device,
        max_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        self.branch, self.store, self.device, self.max_bytes = branch, store, device, max_bytes
        # Row of each item's cached vector, by row of the files; -1: none. The last entry stands
        # for all items without a row, which share the vector of no content.
        self._cache_rows = np.full(store.items.num_rows + 1, -1)
        modalities = len(branch.encoders) if branch.keeps_modalities else 0
        self._cached = torch.zeros(0, branch.dim * (1 + modalities), device=device)  # [S, V]
        self._count = 0  # rows of it that are used

    def __call__(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            vectors = self.vectors(batch.content.items)
            yield replace(batch, content=replace(batch.content, inputs={}, vectors=vectors))

    @torch.no_grad()
    def vectors(self, items: Tensor) -> Tensor:  # int64 [U], on the host -> [U, V], on the device
        ids = items.numpy()
        rows = self.store.rows_of(ids)
        missing = np.flatnonzero(self._cache_rows[rows] < 0)
        chunks = [self._cached[:0]]
        for start in range(0, len(missing), SCORED_ITEMS_PER_CALL):
            inputs = self.store.gather(ids[missing[start : start + SCORED_ITEMS_PER_CALL]])
            inputs = {name: values.to(self.device) for name, values in inputs.items()}
            chunks.append(self.branch.encode(inputs))
        encoded = torch.cat(chunks)
        self._add(rows[missing], encoded)
        cached = torch.from_numpy(self._cache_rows[rows]).to(self.device)
        if not (self._cache_rows[rows] < 0).any():
            return self._cached.index_select(0, cached)
        vectors = self._cached.index_select(0, cached.clamp(min=0))
        vectors[torch.from_numpy(missing).to(self.device)] = encoded
        return vectors

    def _add(self, rows: np.ndarray, vectors: Tensor) -> None:  # [U], [U, V]
        capacity = max(1, self.max_bytes // (vectors.shape[1] * vectors.element_size()))
        num_added = min(len(rows), capacity - self._count)
        end = self._count + num_added
        if end > len(self._cached):
            size = min(capacity, max(2 * end, SCORED_ITEMS_PER_CALL))
            larger = self._cached.new_zeros(size, self._cached.shape[1])
            larger[: self._count] = self._cached[: self._count]
            self._cached = larger
        self._cached[self._count : end] = vectors[:num_added]
        self._cache_rows[rows[:num_added]] = np.arange(self._count, end)
        self._count = end


@torch.no_grad()
def encode_into_bank(
    content: ContentBranch,
    store: ContentStore,
    ranks: Ranks,
    before_write: Callable[[], None] | None = None,
    ids: np.ndarray | None = None,  # [U], the same on every rank; default: all items of the files
    find: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Encode items, without dropout, and write their vectors to the bank. A collective.

    Each rank encodes its share, and calls `before_write` before each write. `find` is a collective
    that returns the items' rows in the bank, -1 for items to leave out; default: ids are rows.
    """
    assert content.bank is not None
    was_training = content.training
    content.eval()
    items = np.sort(store.items.ids) if ids is None else ids
    local = np.array_split(items, ranks.world_size)[ranks.rank]
    # All ranks make the same number of calls, as each is a collective.
    longest = -(-len(items) // ranks.world_size)
    for call in np.array_split(local, -(-longest // items_per_fill(ranks.device))):
        rows = torch.from_numpy(call)
        if find is not None:
            rows = find(rows)
            call, rows = call[rows.numpy() >= 0], rows[rows >= 0]
        vectors = torch.zeros(0, content.bank.dim, device=ranks.device)
        outputs: dict[str, ContentInput] = {}  # of trained encoders, if these are stored
        if len(call):
            inputs = {name: values.to(ranks.device) for name, values in store.gather(call).items()}
            outputs = {} if content.outputs is None else content.outputs.encode(inputs)
            vectors = content.encode(inputs, outputs)
        if before_write is not None:
            before_write()
        rows = rows.to(ranks.device)
        content.bank.update(rows, vectors, content.step)
        if content.outputs is not None:
            content.outputs.write(rows, outputs, content.step)
    content.train(was_training)


SAMPLED_ITEMS = 4096
# Deviations below this share of the outputs' size are rounding: about 100 times that of float32.
ROUNDING = 1e-5
LARGEST_SIZE = 10.0  # root mean square above which the outputs of an encoder are scaled


@torch.no_grad()
def init_projections(
    branch: ContentBranch,
    store: ContentStore,
    ranks: Ranks,
    modalities: Collection[str] | None = None,
    trained: ItemCounts | None = None,
) -> None:
    """Set weights and biases from a sample of the items, equal on all ranks. A collective.

    `trained`, on rank 0 the number of training rows by item, excludes items without any.
    """
    ids = np.sort(store.items.ids)
    if trained is not None and (has_rows := trained.of(ids) > 0).any():
        ids = ids[has_rows]
    indices = np.linspace(0, len(ids) - 1, min(len(ids), SAMPLED_ITEMS)).astype(int)
    sample = ranks.from_first(ids[indices])
    local = np.array_split(sample, ranks.world_size)[ranks.rank]
    branch.eval()
    for name, encoder in branch.encoders.items():
        if modalities is not None and name not in modalities:
            continue
        projection = branch.projections[name]
        assert isinstance(encoder, Encoder) and isinstance(projection, Projection)
        outputs, digests = _mean_outputs(encoder, name, local, store, ranks)
        outputs = gather_rows(outputs, ranks.group)
        digests = [digest for rank_digests in ranks.gather(digests) for digest in rank_digests]
        if len(set(digests)) == 1:  # differences between the outputs are rounding
            outputs = outputs[:1].expand_as(outputs)
        init_from_components(projection, outputs)
        _warn_of_equal_items(store.kinds[name].modality, name, digests)
        for values in projection.state_dict().values():
            # The signs of components depend on the processor, so all ranks use those of rank 0.
            dist.broadcast(values, src=0, group=ranks.group)


def _mean_outputs(
    encoder: Encoder, name: str, ids: np.ndarray, store: ContentStore, ranks: Ranks
) -> tuple[Tensor, list[bytes]]:  # [share of S, E], of items with this modality; content's hashes
    chunks = [torch.zeros(0, encoder.output_dim, device=ranks.device)]
    digests: list[bytes] = []
    for start in range(0, len(ids), ITEMS_PER_CALL):
        content = store.gather(ids[start : start + ITEMS_PER_CALL])[name]
        digests += digests_of(content)
        encoded = encoder.encode(content.to(ranks.device))
        chunks.append(mean_token(encoded.values.float(), encoded.mask)[encoded.mask.any(dim=1)])
    return torch.cat(chunks), digests


def _warn_of_equal_items(modality: ModalitySettings, name: str, digests: list[bytes]) -> None:
    share = share_of_most_common(digests)
    if not is_mostly_equal(share, len(digests)):
        return
    equal, fix = "equal content", "choose a column in which items differ, or remove the modality"
    if modality.kind == "text":
        equal = f"the same first {modality.max_length} tokens (max_length)"
        fix = f"raise content.modalities.{name}.max_length, or {fix}"
    logger.warning(
        f"modality '{name}' (column '{modality.column}'): {round(share * len(digests)):,} of "
        f"{len(digests):,} sampled items have {equal}, which does not distinguish them; {fix}"
    )


def init_from_components(projection: Projection, outputs: Tensor) -> None:  # [S, E]
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


def whitening_map(outputs: Tensor, dim: int, size: float) -> tuple[Tensor, Tensor]:  # [K, E], [K]
    """Return weight and bias that give the leading components of outputs mean 0 and variance 1.

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
