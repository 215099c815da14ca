"""Parquet impressions -> `Batch`, each rank its share, without a Python loop over rows.

Arrow hands list columns over as values and lengths, which is what a KeyedJaggedTensor is made of.
All ranks get the same number of batches of the same sizes, as collectives ask: row-wise tables
refuse unequal ones, and a missing one hangs the job. Where rows do not divide by ranks, a rank with
one row less adds a padding row, which has no weight in losses and counts in no metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.batch import Batch
from recsys.data.content_store import ContentStore
from recsys.data.parquet_rows import ParquetRows, Window
from recsys.data.row_order import EpochShare, Stage, num_batches_of, rows_before
from recsys.data.row_values import (
    RAW_GROUP,
    ROW_POSITION,
    is_list,
    list_lengths,
    padding_rows,
)
from recsys.data.schema import Schema


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _jagged(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values of all lists, length of each list)."""
    array = table[name].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return array.flatten().to_numpy(zero_copy_only=False), list_lengths(array)


def _keyed_jagged(table: pa.Table, names: list[str]) -> KeyedJaggedTensor:
    values, lengths = [], []
    for name in names:
        if not is_list(table.schema.field(name).type):
            values.append(_numbers(table, name))
            lengths.append(np.ones(table.num_rows, dtype=np.int32))
        else:
            jagged_values, jagged_lengths = _jagged(table, name)
            values.append(jagged_values)
            lengths.append(jagged_lengths.astype(np.int32))
    return KeyedJaggedTensor.from_lengths_sync(
        keys=names,
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )


class BatchBuilder:
    """Turns a table of impressions into a `Batch`.

    Args:
        schema: meaning of the columns.
        pooled_features: columns whose tables are pooled, in the order of the model.
        store: content of the items; None for a model without content.
        encode_history: the history's items are encoded as well, not looked up in the bank.
        index_dedup: the history's items are looked up once each in the ID table, too.
        with_labels: False for files to predict, which need not have labels.
    """

    def __init__(
        self,
        schema: Schema,
        pooled_features: list[str],
        store: ContentStore | None = None,
        encode_history: bool = False,
        index_dedup: bool = True,
        with_labels: bool = True,
    ) -> None:
        self.schema = schema
        self.pooled_features = pooled_features
        self.store = store
        self.encode_history = encode_history
        self.index_dedup = index_dedup
        self.with_labels = with_labels

    def __call__(self, table: pa.Table) -> Batch:
        schema, num_rows = self.schema, table.num_rows
        target = _numbers(table, schema.target_item)
        history, history_lengths = np.zeros(0, np.int64), np.zeros(num_rows, np.int64)
        if schema.history:
            history, history_lengths = _jagged(table, schema.history)
        parallel = [_jagged(table, name)[0] for name in schema.parallel]
        history_items, history_index = unique_items(history)
        encoded = np.concatenate([target, history_items if self.encode_history else history[:0]])
        content_items, encoded_index = unique_items(encoded)
        group = RAW_GROUP if RAW_GROUP in table.column_names else schema.group
        return Batch(
            dense_features=self._columns(table, schema.of_kind("dense")),
            sparse_features=_keyed_jagged(table, self.pooled_features)
            if self.pooled_features
            else None,
            labels=self._columns(table, schema.of_kind("label"))
            if self.with_labels
            else torch.zeros(num_rows, len(schema.of_kind("label"))),
            sequence_features=self._sequences(
                target,
                history_items if self.index_dedup else history,
                None if self.index_dedup else history_lengths,
            ),
            target_items=torch.tensor(target),
            groups=torch.tensor(_numbers(table, group)),
            row_positions=torch.tensor(_numbers(table, ROW_POSITION)),
            history_lengths=torch.from_numpy(history_lengths.astype(np.int64)),
            history_values=torch.from_numpy(np.stack(parallel, axis=1))
            if parallel
            else torch.zeros(len(history), 0),
            history_items=torch.from_numpy(history_items),
            history_index=torch.from_numpy(history_index),
            content_items=torch.from_numpy(content_items),
            target_index=torch.from_numpy(encoded_index[:num_rows]),
            history_content_index=torch.from_numpy(encoded_index[num_rows:]),
            bank_items=torch.zeros(0, dtype=torch.int64),
            content=self.store.gather(content_items) if self.store is not None else {},
            longest_history=int(history_lengths.max(initial=0)),
        )

    def _sequences(
        self, target: np.ndarray, history: np.ndarray, lengths: np.ndarray | None
    ) -> KeyedJaggedTensor:
        """Ids of target and history; `lengths` by row, None where the ids are unique ones."""
        names, all_lengths = [self.schema.target_item], [np.ones(len(target), np.int32)]
        if self.schema.history:
            if lengths is None:
                # They belong to no row, but a KeyedJaggedTensor wants every id in one.
                lengths = np.zeros(len(target), np.int32)
                lengths[0] = len(history)
            names.append(self.schema.history)
            all_lengths.append(lengths.astype(np.int32))
        return KeyedJaggedTensor.from_lengths_sync(
            keys=names,
            values=torch.from_numpy(np.concatenate([target, history])),
            lengths=torch.from_numpy(np.concatenate(all_lengths)),
        )

    def _columns(self, table: pa.Table, names: list[str]) -> torch.Tensor:
        if not names:
            return torch.zeros(table.num_rows, 0)
        return torch.from_numpy(np.stack([_numbers(table, name) for name in names], axis=1))


def unique_items(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the distinct items in rising order, where each of `items` is among them)."""
    return np.unique(items, return_inverse=True)


class Interactions(IterableDataset[Batch]):
    """The batches of one rank's share of a split.

    Args:
        rows: the split.
        build: makes a `Batch` of a table.
        batch_size: most impressions per batch.
        rank, world_size: which share.
        seed: shuffles, differently in each epoch; None keeps the order of the files.

    Raises:
        ValueError: training on fewer rows than ranks.
    """

    def __init__(
        self,
        rows: ParquetRows,
        build: BatchBuilder,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ) -> None:
        if seed is not None and rows.num_rows < world_size:
            raise ValueError(
                f"{rows.row_groups[0].file}: {rows.num_rows} training rows cannot be shared by "
                f"{world_size} ranks; start fewer ranks"
            )
        self.rows, self.build, self.batch_size = rows, build, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.begin(0)

    def begin(self, epoch: int, stages: Sequence[Stage] = (), first_batch: int = 0) -> None:
        """Sets where the next iteration starts.

        Args:
            epoch: decides the shuffle.
            stages: what other numbers of ranks, or other batch sizes, have read of this epoch.
            first_batch: how many batches of the rest this number of ranks has read.
        """
        self.epoch, self.first_batch = epoch, first_batch
        self.shuffle_seed = None if self.seed is None else (self.seed, epoch)
        self.share = EpochShare.of(self.rows, stages, self.rank, self.world_size, self.shuffle_seed)
        self.num_batches = num_batches_of(self.share.num_rows, self.batch_size)

    def batches_until(self, part: int, parts: int) -> int:
        """How many batches of this share lie in the first `part` of `parts` of the epoch."""
        left = self.rows.num_rows - self.share.rows_done
        if part == parts or not left:
            return self.num_batches
        wanted = self.rows.num_rows * part - self.share.rows_done * parts
        return max(0, wanted * self.num_batches // (left * parts))

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[Batch]:
        """The rest of an epoch; see `begin`.

        Of several loader processes each reads all rows and builds every n-th batch; the loader
        takes them in turn, which restores the order.
        """
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index, table in enumerate(self._tables()):
            if index % step == first:
                yield self.build(table)

    def _tables(self) -> Iterator[pa.Table]:
        """The rows of each batch."""
        num_rows, num_batches = self.share.num_rows, self.num_batches
        done = rows_before(self.first_batch, num_rows, num_batches)
        tables = self._rest_of_share(done)
        rest: Any = next(tables, None)  # None where nothing is left
        for index in range(self.first_batch, num_batches):
            size = rows_before(index + 1, num_rows, num_batches) - done
            done += size
            while rest.num_rows < size:
                rest = pa.concat_tables([rest, next(tables)])
            yield rest.slice(0, size)
            rest = rest.slice(size)

    def _rest_of_share(self, done: int) -> Iterator[pa.Table]:
        """The share's tables from row `done` on, with padding rows up to the largest share."""
        num_rows, table = 0, None
        for piece in self.share.slices:
            first = piece.low + max(0, done - num_rows)
            num_rows += len(piece)
            if first < piece.high:
                table = self.rows.read_window(piece.window, self.shuffle_seed)
                yield table.slice(first, piece.high - first)
        if missing := self.share.num_rows - max(num_rows, done):
            if table is None:  # only its types are wanted
                table = self.rows.read_window(Window(0, 1))
            yield padding_rows(table, missing)


def loader(interactions: Interactions, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Iterates `interactions`, in this process or, in the same order, in `num_workers` others."""
    return DataLoader(
        interactions,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Of its own, or each pass would draw from the numbers that dropout is to get.
        generator=torch.Generator(),
    )
