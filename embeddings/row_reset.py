"""Reset rows of a sharded table to their initial weights when another id takes them over.

A :class:`~embeddings.vocabulary.bounded.BoundedVocabulary` gives the row of a rare id to a new one,
which must not inherit the weights and the optimizer state of the old id.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.table_shards import TableShard, local_shards
from embeddings.tables import INITIALIZATION_BLOCK_ROWS, NormalInitializer, TableConfig


class RowReset:
    """Sets rows to initial weights and zeroes their optimizer state.

    A row gets the initial weights of a table on CPU. Only the first block of
    ``INITIALIZATION_BLOCK_ROWS`` rows is drawn and kept; later rows reuse it, block after block.
    The weights are the same on every rank and under every plan, as a row's columns may be on
    several ranks.

    Args:
        model: sharded under any plan.
        tables: the tables that may be reset.
        seed: the seed given to ``torch.manual_seed`` before the tables were built.

    Example::

        import torch
        from torch import nn
        from torchrec.distributed.model_parallel import DistributedModelParallel
        from embeddings import RowReset, TableConfig, build_embedding_collection
        from embeddings import fuse_table_optimizers, plan_sharding, sharders

        tables = [TableConfig("item", 100, 4, ["item"])]
        model = nn.ModuleDict({"embeddings": build_embedding_collection(tables)})
        fuse_table_optimizers(model, tables)
        plan = plan_sharding(model, tables)
        sharded = DistributedModelParallel(model, plan=plan, sharders=sharders())
        RowReset(sharded, tables, seed=0)("item", torch.tensor([3, 7]))
    """

    def __init__(
        self, model: DistributedModelParallel, tables: Sequence[TableConfig], seed: int
    ) -> None:
        """Draw the initial weights of each table and collect its shards on this rank."""
        self._fresh = {table.name: _fresh_rows(table, seed) for table in tables}
        self._shards: dict[str, list[TableShard]] = {table.name: [] for table in tables}
        for name, shard in local_shards(model):
            if name in self._shards:
                self._shards[name].append(shard)

    @torch.no_grad()
    def __call__(self, table: str, rows: Tensor) -> None:
        """Reset ``rows``, int64 [N] and the same on all ranks, of ``table``; not a collective.

        On CUDA the work is queued on the default stream, where steps run, and not on the current
        one: a pipeline fetches its batches, and so maps their ids, on another stream.
        """
        for shard in self._shards[table]:
            inside = rows[shard.contains(rows)]
            if not len(inside):
                continue
            fresh = self._fresh[table][inside % INITIALIZATION_BLOCK_ROWS, shard.columns]
            device = shard.weight.device
            on_cuda = device.type == "cuda"
            with torch.cuda.stream(torch.cuda.default_stream(device) if on_cuda else None):
                places = (inside - shard.row).to(device)
                shard.weight[places] = fresh.to(shard.weight)
                for state in shard.states:
                    state[places] = 0


def _fresh_rows(table: TableConfig, seed: int) -> Tensor:
    """Return initial weights of the table's first block of rows, [at most a block, D]."""
    rows = min(INITIALIZATION_BLOCK_ROWS, table.num_embeddings)
    fresh = torch.empty(rows, table.embedding_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        NormalInitializer(table).fill(fresh)
    return fresh
