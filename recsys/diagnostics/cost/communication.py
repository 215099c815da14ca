"""Computes the bytes that a rank sends to others in a step, by kind of data and sharding of tables.

Numbers are means over ranks with similar batches. An id goes to the rank that has its row, or to
each rank that has a column shard of it; lengths of lists of ids go to every rank that may have some
of the rows. Pooled vectors of row-wise tables are sums of which every rank has a part, so each rank
sends one for each row of all batches; those of table-row-wise tables are first summed within a
node. Ranks with other tables send the looked-up vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from embeddings import is_replicated
from embeddings.table_memory import TableMemory
from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.model_sizes import ContentSizes, ModelSizes

FLOAT, DOUBLE, LENGTH, ID = 4, 8, 4, 8  # bytes
BYTES_OF_TYPE = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Sent:
    """Bytes of one kind that a rank sends to others in a step.

    is_ring: by an all_reduce.
    copies: copies of the tables, if only the ranks that share one exchange these bytes.
    stays_in_node: whether they are sent between ranks of one node only.
    """

    name: str
    forward: float = 0.0
    backward: float = 0.0
    is_ring: bool = False
    copies: int = 1
    stays_in_node: bool = False

    @property
    def bytes(self) -> float:
        """Return the bytes of both directions."""
        return self.forward + self.backward


def sent_bytes(sizes: ModelSizes, counts: BatchCounts, world_size: int) -> list[Sent]:
    """Return the bytes that a rank sends, by kind; an empty list on one rank."""
    if world_size == 1:
        return []
    others = (world_size - 1) / world_size
    copies = sizes.parallel.copies
    ids = sum(_ids(table, counts, world_size // copies) for table in sizes.tables)
    vectors = sum(_vectors(table, counts, world_size // copies) for table in sizes.tables)
    types = sizes.communication
    sent = [
        Sent("ids", forward=ids, copies=copies),
        Sent(
            "ID vectors",
            forward=BYTES_OF_TYPE[types.forward] * vectors,
            backward=BYTES_OF_TYPE[types.backward] * vectors,
            copies=copies,
        ),
    ]
    if copies > 1:
        sent.append(_mean_of_copies(sizes, world_size))
    if sizes.content is not None:
        sent += _of_content(sizes.content, counts, world_size)
    if sizes.num_standardized:
        statistics = 2 * others * DOUBLE * (1 + 2 * sizes.num_standardized)
        sent.append(Sent("statistics", forward=statistics, is_ring=True))
    dense = 2 * others * FLOAT * sizes.dense_parameters
    return [*sent, Sent("dense gradients", backward=dense, is_ring=True)]


def _mean_of_copies(sizes: ModelSizes, world_size: int) -> Sent:
    """Return the mean of all copies' weights and state, an all_reduce every few steps."""
    copies = sizes.parallel.copies
    held = sum(table.weight_bytes + table.state_bytes for table in sizes.tables)
    of_rank = held / (world_size // copies) / sizes.parallel.sync_every_steps
    ring = 2 * (copies - 1) / copies * of_rank
    return Sent("mean of copies", backward=ring, is_ring=True, stays_in_node=True)


def _ids(table: TableMemory, counts: BatchCounts, world_size: int) -> float:
    others = (world_size - 1) / world_size
    values = ID * counts.lookups(table.table.features)[0] * table.column_shards * others
    lengths = LENGTH * counts.rows * len(table.table.features)
    if table.sharding == "row_wise":
        return values + lengths * (world_size - 1)
    if table.sharding == "table_row_wise":
        return values + lengths * len(table.shards) * others
    return values + lengths * table.column_shards * others


def _vectors(table: TableMemory, counts: BatchCounts, world_size: int) -> float:
    """Return how many numbers a rank sends in one direction."""
    dim, others = table.table.embedding_dim, (world_size - 1) / world_size
    if table.table.pooling == "none":
        return dim * counts.lookups(table.table.features)[0] * others
    pooled = dim * counts.rows * len(table.table.features)
    if table.sharding == "row_wise":
        return pooled * (world_size - 1)
    if table.sharding == "table_row_wise":
        of_node = len(table.shards)
        return pooled * (of_node - 1 + 1 - of_node / world_size)
    return pooled * others


def _of_bank(content: ContentSizes, counts: BatchCounts, world_size: int) -> float:
    row = ID + FLOAT * (content.vector_dim + 1)
    sizes = content.num_items, content.vector_dim, world_size, content.bank_placement
    if is_replicated(*sizes):
        return (world_size - 1) * (counts.encoded * row + ID)  # written rows go to every rank
    rows = counts.encoded + counts.stored + counts.unique_history
    return (world_size - 1) / world_size * rows * row


def _of_content(content: ContentSizes, counts: BatchCounts, world_size: int) -> list[Sent]:
    sent, others = [], (world_size - 1) / world_size
    if content.mode != "full":
        sent.append(Sent("memory bank", forward=_of_bank(content, counts, world_size)))
    if content.exchanges:
        vectors = others * counts.exchanged * FLOAT * content.vector_dim
        ids = others * counts.exchanged * ID
        sent.append(Sent("content vectors", forward=ids + vectors, backward=vectors))
    if content.contrastive_dim and content.contrastive_gathers:
        # Both sides of each row and the item's id, to every other rank.
        rows = (world_size - 1) * counts.rows
        both = 2 * FLOAT * content.contrastive_dim * rows
        sent.append(Sent("contrastive loss", forward=both + ID * rows, backward=both))
    return sent
