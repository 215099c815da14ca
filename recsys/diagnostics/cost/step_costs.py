"""FLOPs and least bytes of a training step, by part, from formulas.

They count what the product executes: each unique item once, nothing padded, the gradient of what
trains alone. The parts of a step follow one another, so that the floors of all add up to the
step's. Numbers are float32. Letters: see `recsys.data.jagged_history`.
"""

from __future__ import annotations

from itertools import pairwise

from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.communication import sent_bytes
from recsys.diagnostics.cost.content_cost import content_parts
from recsys.diagnostics.cost.model_sizes import ContentSizes, ModelSizes, RankingSizes
from recsys.diagnostics.cost.roofline import Anchor
from recsys.diagnostics.cost.work import FLOAT, PartCost, Work, linear, moved, times

ADAMW_BYTES = 7 * FLOAT  # reads weight, gradient and two moments, writes all but the gradient
ADAMW_FLOPS = 12
COMMUNICATION = "communication"
DIRECTIONS = ("forward", "backward")


def step_costs(sizes: ModelSizes, counts: BatchCounts, world_size: int = 1) -> list[PartCost]:
    """The parts of one step on one rank."""
    content = sizes.content
    parts = [lookup(sizes, counts)]
    if content is not None:
        parts += content_parts(content, counts)
    parts += ranking(sizes, counts)
    if content is not None and content.contrastive_dim:
        parts.append(contrastive(sizes, content, counts, world_size))
    parameters = sizes.dense_parameters
    update = Work(others=ADAMW_FLOPS * parameters, bytes=ADAMW_BYTES * parameters)
    parts.append(PartCost("optimizer", "optimizer", update))
    if sent := sent_bytes(sizes, counts, world_size):
        forward, backward = (sum(getattr(s, name) for s in sent) for name in DIRECTIONS)
        parts.append(
            PartCost(COMMUNICATION, COMMUNICATION, Work(bytes=forward), Work(bytes=backward))
        )
    return parts


def floors_by_measured_part(parts: list[PartCost], anchor: Anchor) -> dict[str, float]:
    """Sums seconds by part of the step trace; all backward work is in the part `backward`."""
    floors: dict[str, float] = {}
    for part in parts:
        for name, work in ((part.measured_as, part.forward), ("backward", part.backward)):
            floors[name] = floors.get(name, 0.0) + work.floor(anchor)
    return floors


def lookup(sizes: ModelSizes, counts: BatchCounts) -> PartCost:
    """Rows in, pooled or single vectors out; the fused optimizer runs in the backward."""
    forward, backward = Work(), Work()
    for memory in sizes.tables:
        table, dim = memory.table, memory.table.embedding_dim
        if table.pooling == "none":
            read, outputs, touched = counts.looked_up, counts.looked_up, counts.unique_looked_up
        else:
            read = sum(counts.pooled_ids[name] for name in table.features)
            touched = sum(counts.unique_pooled_ids[name] for name in table.features)
            outputs = counts.rows * len(table.features)
        forward += moved((read + outputs) * dim)
        backward += moved((outputs + 2 * touched) * dim)
        backward += Work(bytes=2 * touched * memory.state_bytes_per_row)
    return PartCost("lookup", "lookup", forward, backward)


def ranking(sizes: ModelSizes, counts: BatchCounts) -> list[PartCost]:
    """The parts of the default ranking model; any other one as a whole."""
    if not isinstance(sizes.ranking, RankingSizes):
        forward, backward = (times(work, counts.rows) for work in sizes.ranking)
        return [PartCost("ranking", "ranking", forward, backward)]
    parts = [id_attention(sizes, sizes.ranking, counts), head(sizes.ranking, counts)]
    if sizes.content is not None:
        return [content_attention(sizes, sizes.content, counts), *parts]
    return parts


def id_attention(sizes: ModelSizes, ranking: RankingSizes, counts: BatchCounts) -> PartCost:
    """Counts DIN with its first layer split by input, as `target_attention` computes it."""
    dim, places, parallel = sizes.id_dim, counts.history, sizes.num_parallel
    items = counts.looked_up - counts.rows
    first, *rest = ranking.attention_units
    widths = [first, *rest, 1]
    layers = linear(items, dim, first) + linear(counts.rows, dim, first)
    layers += linear(places, dim, first)
    for before, after in pairwise(widths):
        layers += linear(places, before, after)
    of_parallel = linear(places, parallel, dim) + linear(places, parallel, first)
    small = linear(first, dim, parallel) + linear(counts.rows, parallel, dim)
    total = Work(others=2 * places * dim)  # the weighted sum
    numbers = moved((items + 2 * counts.rows) * dim + places * (1 + parallel))
    forward = layers + of_parallel + small + total + numbers
    backward = times(layers, 2) + of_parallel + times(small, 2) + times(total, 2)
    # The mapped sums of parallel lists get a gradient through the weights.
    return PartCost("attention, ID", "ranking", forward, backward + times(numbers, 2))


def content_attention(sizes: ModelSizes, content: ContentSizes, counts: BatchCounts) -> PartCost:
    """Dot products with the mapped target, the weighted sum, and cosines."""
    dim, places, rows = content.dim, counts.history, counts.rows
    query = linear(rows, dim, dim)
    small = times(linear(rows, sizes.num_parallel, dim), 2)  # scores of the lists, and their sums
    dots = Work(others=2 * places * dim)
    items_train = content.mode != "bank_frozen"
    numbers = moved((counts.unique_history + 2 * rows) * dim + places * (1 + sizes.num_parallel))
    forward = query + small + times(dots, 2 + content.num_cosines) + numbers
    # To the queries and weights; to the items where they train, cosines of mean tokens never.
    gradients = 2 + content.num_cosines
    gradients += items_train * (2 + min(content.num_cosines, 1))
    backward = times(query, 2) + times(small, 2) + times(dots, gradients) + times(numbers, 2)
    return PartCost("attention, content", "ranking", forward, backward)


def head(sizes: RankingSizes, counts: BatchCounts) -> PartCost:
    """Low-rank cross layers and the MLP."""
    rows, width = counts.rows, sizes.head_widths[0]
    forward = times(linear(rows, width, sizes.cross_rank), 2 * sizes.cross_layers)
    weights = 2 * sizes.cross_layers * width * sizes.cross_rank
    for before, after in pairwise(sizes.head_widths):
        forward += linear(rows, before, after)
        weights += before * after
    numbers = moved(rows * (width + sizes.head_widths[-1]) + weights)
    return PartCost(
        "ranking head", "ranking", forward + numbers, times(forward, 2) + times(numbers, 2)
    )


def contrastive(
    sizes: ModelSizes, content: ContentSizes, counts: BatchCounts, world_size: int
) -> PartCost:
    """Both maps, and the scores of all rows of the batch against all, which serve both ways.

    Against those of all ranks they are other scores each way.
    """
    rows, dim = counts.rows, content.contrastive_dim
    maps = linear(rows, content.dim, dim) + linear(rows, sizes.id_dim, dim)
    forward = maps + linear(rows, dim, rows)
    if content.contrastive_gathers and world_size > 1:
        forward = maps + times(linear(rows, dim, world_size * rows), 2)
    numbers = moved(rows * (content.dim + sizes.id_dim) + (content.dim + sizes.id_dim) * dim)
    return PartCost("losses", "losses", forward + numbers, times(forward, 2) + times(numbers, 2))
