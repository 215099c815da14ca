"""Load pretrained vectors from Parquet into the shards of a table, by id.

Every rank that holds a shard streams the files and keeps the rows of its shards: no rank ever has
the whole table, and ranks exchange only counts. Rows that no file names keep their initial weights.
Shapes: N rows of one block of a file, D dimension.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from embeddings.pretrained_files import PretrainedBlock, PretrainedFiles, RowsOfIds, read_pretrained


@dataclass(frozen=True)
class LoadedRows:
    """Counts of table rows that were set and of ids in the files that were left out."""

    num_set: int
    num_left_out: int


def load_pretrained_rows(
    model: nn.Module,
    table: str,
    files: PretrainedFiles,
    rows_of_ids: RowsOfIds | None = None,
    process_group: dist.ProcessGroup | None = None,
    may_be_empty: bool = False,
) -> LoadedRows:
    """Write vectors into a table of ``model``, before its first step. A collective.

    Args:
        model: sharded by DistributedModelParallel under any plan, or unsharded and not on meta.
        table: name of the table.
        files: the files to read.
        rows_of_ids: maps ids of the files to rows; default: an id is its row.
        process_group: the ranks of the model; the default group if there is one.
        may_be_empty: accept files without a row for the table.

    Raises:
        ValueError: on every rank, if on any rank the table is missing, a file cannot be used (see
            :func:`~embeddings.pretrained_files.read_pretrained`), an id is outside the table, two
            ids name one row, or the files hold no row for the table. Blocks before the error
            are already written.

    Example::

        import pyarrow as pa
        import pyarrow.parquet as pq
        from embeddings import PretrainedFiles, TableConfig
        from embeddings import build_embedding_collection, load_pretrained_rows

        model = build_embedding_collection([TableConfig("item", 100, 4, ["item"])], "cpu")
        vectors = pa.array([[1.0, 2.0, 3.0, 4.0]], pa.list_(pa.float32()))
        pq.write_table(pa.table({"id": [7], "vector": vectors}), "item_vectors.parquet")
        load_pretrained_rows(model, "item", PretrainedFiles(["item_vectors.parquet"]))
    """
    if process_group is None and dist.is_initialized():
        process_group = dist.group.WORLD
    loaded: LoadedRows | None = None
    error: Exception | None = None
    try:
        table_rows = _TableRows.of(model, table)
        if table_rows.pieces:
            loaded = _load(table_rows, files, rows_of_ids, may_be_empty)
    except Exception as raised:  # of any type: the other ranks wait for the outcome
        error = raised
    return _agree(loaded, error, process_group)


def _agree(
    loaded: LoadedRows | None, error: Exception | None, process_group: dist.ProcessGroup | None
) -> LoadedRows:
    """Return the counts of any rank with a shard; raise on all if one failed. A collective."""
    mine = (loaded, None if error is None else (isinstance(error, ValueError), str(error)))
    outcomes = [mine]
    if process_group is not None:
        outcomes *= dist.get_world_size(process_group)
        dist.all_gather_object(outcomes, mine, group=process_group)
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            is_value_error, message = failure
            raise (ValueError if is_value_error else RuntimeError)(f"rank {rank}: {message}")
    return next(result for result, _ in outcomes if result is not None)


def _load(
    table_rows: "_TableRows",
    files: PretrainedFiles,
    rows_of_ids: RowsOfIds | None,
    may_be_empty: bool,
) -> LoadedRows:
    stored_name = files.table or table_rows.name
    num_set = num_left_out = 0
    for block in read_pretrained(files, stored_name, table_rows.dim):
        rows = block.rows(rows_of_ids)
        known = np.ones(len(rows), dtype=bool) if rows_of_ids is None else rows != -1
        table_rows.check(block, rows, known)
        for piece in table_rows.pieces:
            piece.write(rows, block.vectors)
        num_set += int(known.sum())
        num_left_out += int((~known).sum())
    if num_set == 0 and not may_be_empty:
        where = ", ".join(files.paths) or "no files"
        fault = f"none of the {num_left_out} ids is known" if num_left_out else "none is there"
        raise ValueError(
            f"{where}: no row for table '{table_rows.name}': {fault} (of '{stored_name}' where the "
            "files have a column 'table'); name the files, or the table in them, that hold it"
        )
    return LoadedRows(num_set, num_left_out)


@dataclass(frozen=True)
class _Piece:
    """A rectangle of the table on this rank, with its offsets in the table."""

    weight: Tensor  # [rows, columns], the memory of the model
    row: int
    column: int

    def write(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Copy the part of ``vectors`` [N, D] for ``rows`` [N] that lies in the rectangle."""
        height, width = self.weight.shape
        inside = (rows >= self.row) & (rows < self.row + height)
        values = torch.from_numpy(vectors[inside, self.column : self.column + width])
        places = torch.from_numpy(rows[inside] - self.row)
        self.weight[places.to(self.weight.device)] = values.to(self.weight)


class _TableRows:
    """The pieces of a table on this rank, and which of their rows are set."""

    def __init__(self, name: str, pieces: list[_Piece], num_embeddings: int, dim: int) -> None:
        self.name = name
        self.pieces = pieces
        self.num_embeddings = num_embeddings
        self.dim = dim
        self._first = min((piece.row for piece in pieces), default=0)
        last = max((piece.row + len(piece.weight) for piece in pieces), default=0)
        self._is_set = np.zeros(last - self._first, dtype=bool)

    @staticmethod
    def of(model: nn.Module, name: str) -> "_TableRows":
        """Collect the pieces of table ``name`` in the collections of ``model``."""
        weights = _table_weights(model)
        if name not in weights:
            raise ValueError(f"table '{name}' is not in the model; the tables are {list(weights)}")
        weight = weights[name]
        if isinstance(weight, ShardedTensor):
            pieces = [
                _Piece(shard.tensor.detach(), *shard.metadata.shard_offsets)
                for shard in weight.local_shards()
            ]
            size = weight.metadata().size
        else:
            if weight.is_meta:
                raise ValueError(f"table '{name}' is on meta; shard the model before loading")
            pieces, size = [_Piece(weight.detach(), 0, 0)], weight.shape
        return _TableRows(name, [piece for piece in pieces if piece.weight.numel()], *size)

    def check(self, block: PretrainedBlock, rows: np.ndarray, known: np.ndarray) -> None:
        """Reject rows int64 [N] outside the table, unless not known, and rows set before."""
        outside = known & ((rows < 0) | (rows >= self.num_embeddings))
        if outside.any():
            index = int(outside.argmax())
            raise block.id_error(
                index,
                f"id {block.ids[index].as_py()} is outside [0, {self.num_embeddings}), the rows of "
                f"table '{self.name}'; raise num_embeddings or drop the row",
            )
        local = np.flatnonzero((rows >= self._first) & (rows < self._first + len(self._is_set)))
        places = rows[local] - self._first
        repeated = self._is_set[places]
        first_places = np.unique(places, return_index=True)[1]
        repeated[np.setdiff1d(np.arange(len(places)), first_places)] = True
        if repeated.any():
            index = int(local[repeated.argmax()])
            raise block.id_error(
                index,
                f"id {block.ids[index].as_py()}: row {rows[index]} of table '{self.name}' has a "
                "vector already; keep one per row",
            )
        self._is_set[places] = True


def _table_weights(model: nn.Module) -> dict[str, Tensor | ShardedTensor]:
    """Return every table of the collections in ``model`` by name; sharded ones on every rank."""
    collections = (
        ShardedEmbeddingBagCollection,
        ShardedEmbeddingCollection,
        EmbeddingBagCollection,
        EmbeddingCollection,
    )
    return {
        key.split(".")[-2]: weight
        for module in model.modules()
        if isinstance(module, collections)
        for key, weight in module.state_dict().items()
        if key.endswith(".weight")
    }
