"""Build a `Batch` from rows of impressions, with each item of the batch once.

Shapes: B batch, N history items of the whole batch, U unique items, n ids, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.data.all_positions import expanded
from recsys.data.batch import Batch, BatchContent, ExtraHistory, History, Rows, TargetItems
from recsys.data.items.content_store import ContentStore
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import RAW_GROUP, ROW_POSITION, TARGETS_BEFORE
from recsys.data.schema import Schema
from recsys.data.schema_columns import HistoryColumns

# Up to this many items, in total and per id of a call, scanning all items is faster than hashing.
MAX_FLAGS, FLAGS_PER_ID = 1 << 22, 256


class UniqueItems:
    """Thread-safe, faster `np.unique(items, return_inverse=True)` of ids in `[0, num_items)`."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        # Reused buffers of threads: whether each item occurs (False between calls), and its place.
        self._spare: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n]
        """Return the distinct items [U], ascending, and each id's position among them [n]."""
        if self.num_items > min(MAX_FLAGS, FLAGS_PER_ID * len(items)):
            return unique_by_hashing(items)
        try:
            occurs, slots = self._spare.pop()
        except IndexError:
            occurs, slots = np.zeros(self.num_items, bool), np.empty(self.num_items, np.int64)
        occurs[items] = True
        distinct = np.flatnonzero(occurs)
        occurs[distinct] = False
        slots[distinct] = np.arange(len(distinct))
        positions = slots[items]
        self._spare.append((occurs, slots))
        return distinct, positions


def unique_by_hashing(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n] -> [U], [n]
    """Do the same as `UniqueItems` with a hash table, which sorts only the distinct items."""
    encoded = pa.array(items, pa.int64()).dictionary_encode()
    distinct = encoded.dictionary.to_numpy()
    order = distinct.argsort()
    slots = np.empty(len(order), np.int64)
    slots[order] = np.arange(len(order))
    return distinct[order], slots[encoded.indices.to_numpy()]


def keyed_jagged(
    names: list[str],
    values: Sequence[np.ndarray],  # ids of each feature, [sum of its lengths]
    lengths: Sequence[np.ndarray],  # of each feature, [B]
) -> KeyedJaggedTensor:
    """Return the `KeyedJaggedTensor` of these arrays, with its sums computed by numpy."""
    sizes = [len(ids) for ids in values]
    return KeyedJaggedTensor(
        keys=names,
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths, dtype=np.int32, casting="same_kind")),
        stride=len(lengths[0]),
        length_per_key=sizes,
        offset_per_key=[0, *np.cumsum(sizes).tolist()],
    )


@dataclass(eq=False)
class BatchBuilder:
    """Turns rows of impressions into a `Batch`; several threads may call it at once.

    `pooled_features` have the order of the model. With `encode_history`, history items are encoded
    instead of read from the bank. `content_histories` are extra histories whose content is read.
    """

    schema: Schema
    pooled_features: list[str]
    store: ContentStore | None = None
    encode_history: bool = False
    with_labels: bool = True
    content_histories: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.unique_items = UniqueItems(self.schema.item_id_limit or 2**63)  # raw ids: no limit

    def __call__(self, rows: RowColumns | pa.Table) -> Batch:
        """Return the batch of these rows; it shares memory with `RowColumns`, but copies tables."""
        if isinstance(rows, pa.Table):
            rows = RowColumns.of(rows).take(np.arange(rows.num_rows))
        schema, read = self.schema, rows
        rows, full = expanded(rows, schema)
        num_rows = rows.num_rows
        target = rows.numbers[schema.target_item]
        history, history_lengths = np.zeros(0, np.int64), np.zeros(num_rows, np.int64)
        if schema.history:
            history, history_lengths = rows.values(schema.history), rows.lengths(schema.history)
        with_content = [history, *(rows.values(name) for name in self.content_histories)]
        history_items, index = self.unique_items(np.concatenate(with_content))
        ends = np.cumsum([len(items) for items in with_content[:-1]])
        history_index, *extra_index = np.split(index, ends)
        content_index = dict(zip(self.content_histories, extra_index, strict=True))
        encoded = np.concatenate([target, history_items]) if self.encode_history else target
        content_items, encoded_index = self.unique_items(encoded)
        extra = [self._extra(rows, columns, content_index) for columns in schema.histories[1:]]
        names = schema.of_kind("label")
        labels = _columns(rows, names) if self.with_labels else torch.zeros(num_rows, len(names))
        return Batch(
            dense_features=_columns(rows, schema.of_kind("dense")),
            sparse_features=self._pooled(read),
            labels=labels,
            sequence_features=self._sequences(read, target, history_items),
            rows=self._rows(rows, labels),
            target=TargetItems(torch.from_numpy(target)),
            history=History(
                torch.from_numpy(history_lengths),
                _stacked([rows.values(name) for name in schema.parallel], len(history)),
                int(history_lengths.max(initial=0)),
                index=torch.from_numpy(history_index),
                items=torch.from_numpy(history_items),
                host_lengths=history_lengths,
                extras=extra,
                full=full and full.among(history_items),
            ),
            content=BatchContent(
                items=torch.from_numpy(content_items),
                target_index=torch.from_numpy(encoded_index[:num_rows]),
                history_index=torch.from_numpy(encoded_index[num_rows:]),
                inputs=self.store.gather(content_items) if self.store is not None else {},
            ),
        )

    def _rows(self, columns: RowColumns, labels: Tensor) -> Rows:  # labels [B, C]
        schema = self.schema
        positions = torch.from_numpy(columns.numbers[ROW_POSITION])
        group = RAW_GROUP if RAW_GROUP in columns.numbers else schema.group
        rows = Rows(positions, torch.from_numpy(columns.numbers[group]))
        if not self.with_labels:
            return rows
        if TARGETS_BEFORE in columns.numbers:  # ranks have different numbers of targets
            rows.weights = (positions >= 0).float()
        if schema.weight:
            rows.weights = torch.from_numpy(columns.numbers[schema.weight])
        if any(column.nullable for column in schema.columns.values()):
            rows.label_weights = rows.loss_weights.unsqueeze(1) * ~labels.isnan()
        if extra := schema.of_kind("extra"):
            rows.extra = _columns(columns, extra)
        return rows

    def _extra(
        self, rows: RowColumns, history: HistoryColumns, content_index: dict[str, np.ndarray]
    ) -> ExtraHistory:
        lengths = rows.lengths(history.name) // self.schema.rows_per_id(history.name)
        values = _stacked([rows.values(name) for name in history.numbers], int(lengths.sum()))
        index = content_index.get(history.name, np.zeros(0, np.int64))
        longest = int(lengths.max(initial=0))
        return ExtraHistory(torch.from_numpy(lengths), values, longest, torch.from_numpy(index))

    def _pooled(self, rows: RowColumns) -> KeyedJaggedTensor | None:
        if not (names := self.pooled_features):
            return None
        values_lengths = ((rows.values(name), rows.lengths(name)) for name in names)
        return keyed_jagged(names, *zip(*values_lengths))

    def _sequences(
        self, rows: RowColumns, target: np.ndarray, history: np.ndarray
    ) -> KeyedJaggedTensor:  # target [B], history [U]
        """Return the ids of targets and events; ids of the first history are unique."""
        # Unique ids belong to no row, but a KeyedJaggedTensor needs a row for each: the first.
        lengths = np.zeros(rows.num_rows, np.int64)
        lengths[0] = len(history)
        names = [self.schema.target_item, *self.schema.event_columns]
        values_lengths = {name: (rows.values(name), rows.lengths(name)) for name in names}
        if TARGETS_BEFORE in rows.numbers:
            values_lengths[self.schema.target_item] = target, rows.numbers[TARGETS_BEFORE] + 1
        if self.schema.history:
            values_lengths[self.schema.history] = history, lengths
        return keyed_jagged(names, *zip(*values_lengths.values()))


def _columns(rows: RowColumns, names: list[str]) -> Tensor:  # [B, C]
    return _stacked([rows.numbers[name] for name in names], rows.num_rows)


def _stacked(arrays: list[np.ndarray], length: int) -> Tensor:  # -> [length, C]
    """Stack C columns of `length` values as a float32 matrix."""
    if len(arrays) == 1:
        return torch.from_numpy(arrays[0]).unsqueeze(1)
    matrix = np.empty((length, len(arrays)), np.float32)
    for index, array in enumerate(arrays):
        matrix[:, index] = array
    return torch.from_numpy(matrix)
