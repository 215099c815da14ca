"""Adds up FLOPs and least bytes of a training step, by part.

Costs of model parts are those counted by `recsys.diagnostics.cost.counted`, times the items, tokens
and rows of a step; lookups, the loss over all rows and the optimizer follow formulas. The parts of
a step do not overlap, so that their rooflines add up to the step's. Numbers are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.communication import sent_bytes
from recsys.diagnostics.cost.model_sizes import ContentSizes, ModelSizes
from recsys.diagnostics.cost.roofline import Anchor
from recsys.diagnostics.cost.work import FLOAT, PartCost, Work, linear, moved, times

COMMUNICATION = "communication"


def step_costs(sizes: ModelSizes, counts: BatchCounts, world_size: int = 1) -> list[PartCost]:
    """Return the parts of one step on one rank."""
    content = sizes.content
    parts = [lookup(sizes, counts)]
    if content is not None:
        parts += content_parts(content, counts)
    parts += [part.scaled(counts.rows) for part in sizes.ranking]
    if content is not None and content.contrastive_dim:
        parts.append(contrastive(sizes, content, counts, world_size))
    # Weight, gradient and state are read, weight and state written; 12 FLOPs per weight for AdamW.
    weights, state = sizes.dense_parameters, sizes.optimizer_state
    update = Work(others=2 * weights + 5 * state, bytes=FLOAT * (3 * weights + 2 * state))
    parts.append(PartCost("optimizer", "optimizer", update))
    if sent := sent_bytes(sizes, counts, world_size):
        forward = Work(bytes=sum(kind.forward for kind in sent))
        backward = Work(bytes=sum(kind.backward for kind in sent))
        parts.append(PartCost(COMMUNICATION, COMMUNICATION, forward, backward))
    return parts


def roofline_by_measured_part(parts: list[PartCost], anchor: Anchor) -> dict[str, float]:
    """Sum roofline seconds by part of the step trace; all backward work is in `backward`."""
    seconds: dict[str, float] = {}
    for part in parts:
        for name, work in ((part.measured_as, part.forward), ("backward", part.backward)):
            seconds[name] = seconds.get(name, 0.0) + work.roofline(anchor)
    return seconds


def lookup(sizes: ModelSizes, counts: BatchCounts) -> PartCost:
    """Count rows read and vectors written; the fused optimizer runs in the backward."""
    forward, backward = Work(), Work()
    for memory in sizes.tables:
        table, dim = memory.table, memory.table.embedding_dim
        read, touched = counts.lookups(table.features)
        outputs = read if table.pooling == "none" else counts.rows * len(table.features)
        forward += moved((read + outputs) * dim)
        backward += moved((outputs + 2 * touched) * dim)
        backward += Work(bytes=2 * touched * memory.state_bytes_per_row)
    return PartCost("lookup", "lookup", forward, backward)


def content_parts(content: ContentSizes, counts: BatchCounts) -> Iterator[PartCost]:
    """Yield the parts of the content branch, from encoders to the vectors of the history.

    Each unique item is encoded once; only items with gradient have a backward.
    """
    share = counts.with_gradient / max(counts.encoded, 1)
    encoders, projections, per_item = [], [], 0.0
    for modality in content.modalities:
        of_batch = counts.modalities[modality.name]
        length = of_batch.longest
        tokens, pairs = counts.encoded * length, counts.encoded * length**2
        if modality.groups_by_length:
            tokens, pairs = of_batch.grouped, of_batch.grouped_pairs
        encoders.append(modality.encoder.on(counts.encoded, tokens, pairs, share))
        given = length if modality.fixed_tokens is None else modality.fixed_tokens
        tokens = counts.encoded * given
        projections.append(modality.projection.on(counts.encoded, tokens, 0, share))
        per_item += given
    yield _together("encoders", "encoders", encoders)
    yield _together("projections", "content", projections)
    tokens = counts.encoded * per_item
    fused = content.fusion.on(counts.encoded, tokens, tokens * per_item, share)
    yield PartCost("fusion", "fusion", *fused)
    if content.mode != "full":
        read = counts.stored + counts.unique_history
        kept = (counts.encoded + read) * (content.vector_dim + 1)
        yield PartCost("memory bank", "content", moved(2 * kept))
    yield history_map(content, counts)


def history_map(content: ContentSizes, counts: BatchCounts) -> PartCost:
    """Count the map of unique history items or, with kernels, that of queries and sums of rows."""
    if not content.maps_of_row:
        items = content.history_map.on(0, counts.unique_history)
        return PartCost("history map", "content", *items)
    rows, dim = content.maps_of_row * counts.rows, content.dim
    forward = linear(rows, dim, dim) + moved(2 * rows * dim + dim**2)
    backward = times(linear(rows, dim, dim), 2) + moved(3 * rows * dim + 2 * dim**2)
    if content.maps_lengths:
        of_items = linear(counts.unique_history, dim, dim)
        forward, backward = forward + of_items, backward + of_items
    return PartCost("history map", "content", forward, backward)


def _together(name: str, measured_as: str, costs: Sequence[tuple[Work, Work]]) -> PartCost:
    forward, backward = (sum((cost[way] for cost in costs), Work()) for way in (0, 1))
    return PartCost(name, measured_as, forward, backward)


def contrastive(
    sizes: ModelSizes, content: ContentSizes, counts: BatchCounts, world_size: int
) -> PartCost:
    """Count both maps and the scores of all pairs of rows, which serve both directions.

    If rows of all ranks are gathered, each direction has scores of its own.
    """
    rows, dim = counts.rows, content.contrastive_dim
    maps = linear(rows, content.dim, dim) + linear(rows, sizes.id_dim, dim)
    forward = maps + linear(rows, dim, rows)
    if content.contrastive_gathers and world_size > 1:
        forward = maps + times(linear(rows, dim, world_size * rows), 2)
    numbers = moved(rows * (content.dim + sizes.id_dim) + (content.dim + sizes.id_dim) * dim)
    return PartCost("losses", "losses", forward + numbers, times(forward, 2) + times(numbers, 2))
