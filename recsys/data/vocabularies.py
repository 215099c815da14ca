"""Ids of a batch before it enters the pipeline: bounded maps, and counts of unknown ids.

A bounded map changes with every batch and is shared by all ranks. The main thread maps its ids, in
the order of the steps.
Shapes: B batch, N ids of one feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.table_state import State
from embeddings.vocabulary.bounded import PIPELINED_STEPS, BoundedVocabulary, VocabularyCounts
from recsys.data.batch import Batch, TargetItems
from recsys.data.schema import Schema

# Batches mapped ahead of their step: in the pipeline, and one in `content.batch_preparation`.
MAPPED_AHEAD = PIPELINED_STEPS + 1


class BoundedVocabularies:
    """Bounded vocabularies of a job, by table. Every method is a collective.

    `pooled_features` are the columns of pooled tables; `reset` resets reassigned rows.
    """

    def __init__(
        self,
        schema: Schema,
        pooled_features: Sequence[str],
        group: dist.ProcessGroup | None = None,
        reset: Callable[[str, Tensor], None] | None = None,  # takes a table, and rows
    ) -> None:
        self.reset = reset
        self.target, self.history = schema.target_item, schema.history
        self.features: dict[str, list[str]] = {}
        self.by_table: dict[str, BoundedVocabulary] = {}
        looked_up = [*pooled_features, schema.target_item, *schema.event_columns]
        for table in schema.tables_with("bounded"):
            features = [name for name in looked_up if schema.table_of(name) == table]
            if features and (settings := schema.vocabulary_of(table)) is not None:
                self.features[table] = features
                sizes = schema.limit(table), settings.admit_after, settings.half_life
                self.by_table[table] = BoundedVocabulary(*sizes, MAPPED_AHEAD, process_group=group)

    @property
    def items(self) -> BoundedVocabulary | None:
        """The vocabulary of the ranked items, if training learns their rows."""
        return self.by_table.get(self.target)

    @property
    def find_items(self) -> Callable[[Tensor], Tensor] | None:
        """Return the function from items to rows of the memory bank, -1 without; None: the same."""
        return None if self.items is None else self.items.find

    def map_batch(self, batch: Batch, step: int, training: bool) -> None:
        """Replace raw ids by rows, in the memory of a batch on the host; call it once per batch.

        Only `training` admits and evicts ids, and resets reassigned rows. A collective.
        """
        for table, vocabulary in self.by_table.items():
            places = [self._feature_ids(batch, name, training) for name in self.features[table]]
            raw = [ids.raw() for ids in places]
            rows = vocabulary.rows_of(torch.cat(raw), step, training)
            evicted = vocabulary.take_evicted_rows()
            if self.reset is not None and len(evicted):
                self.reset(table, evicted)
            for ids, part in zip(places, rows.split([len(keys) for keys in raw]), strict=True):
                ids.put(part, vocabulary.unknown_row)
            if table == self.target:
                items = batch.sequence_features.values()[: batch.batch_size].clone()
                has_row = items != vocabulary.unknown_row
                batch.target = TargetItems(items, batch.target.items, has_row)

    def _feature_ids(self, batch: Batch, name: str, training: bool) -> _Ids | _HistoryIds:
        """Return the ids of a feature; without training, those of padding rows too."""
        pooled, features = batch.sparse_features, batch.sequence_features
        if pooled is not None and name in pooled.keys():  # noqa: SIM118 - it is no dict
            features = pooled
        ids = _Ids.of(batch, features, name)
        if name == self.history and self.features.get(self.target):
            further = [history.index for history in batch.history.further]
            return _HistoryIds(batch, ids.values, torch.cat([batch.history.index, *further]))
        if name == self.target and not training:
            return replace(ids, counts=torch.ones_like(ids.counts))
        return ids

    def counts(self) -> dict[str, VocabularyCounts]:
        """Return the counts of events in each vocabulary since the last call, over all ranks."""
        return {table: vocabulary.counts() for table, vocabulary in self.by_table.items()}

    def state_dict(self) -> State:
        """Return tensors that torch.distributed.checkpoint saves, and loads in place."""
        return {
            f"{table}.{name}": value
            for table, vocabulary in self.by_table.items()
            for name, value in vocabulary.state_dict().items()
        }


@dataclass(frozen=True)
class _Ids:
    """Ids of one feature in a batch."""

    values: Tensor  # [N], the batch's memory
    counts: Tensor  # bool [N], False for ids of padding rows

    @staticmethod
    def of(batch: Batch, features: KeyedJaggedTensor, name: str) -> _Ids:
        index = features.keys().index(name)
        first, last = features.offset_per_key()[index : index + 2]
        lengths = features.lengths().view(len(features.keys()), -1)[index]  # [B]
        is_row = batch.rows.positions >= 0
        if (whole := batch.history.whole) is not None:
            is_row = is_row.new_zeros(len(whole.lengths)).index_put((whole.rows,), is_row)
        counts = torch.repeat_interleave(is_row, lengths)
        return _Ids(features.values()[first:last], counts)

    def raw(self) -> Tensor:
        return self.values[self.counts]

    def put(self, rows: Tensor, unknown_row: int) -> None:
        self.values.fill_(unknown_row)
        self.values[self.counts] = rows


@dataclass(frozen=True)
class _HistoryIds:
    """Items of the histories whose content is read; every occurrence counts as a use."""

    batch: Batch
    values: Tensor  # of the first history's feature, each item once, the batch's memory
    index: Tensor  # of the items at all places of the histories

    def raw(self) -> Tensor:
        return self.batch.history.items[self.index]

    def put(self, rows: Tensor, unknown_row: int) -> None:
        unique = torch.full_like(self.batch.history.items, unknown_row)
        unique[self.index] = rows
        self.batch.history = replace(self.batch.history, items=unique)
        self.values.copy_(unique)


class UnknownIds:
    """Counts the ids of a pass over data that map to the row of unknown ids."""

    def __init__(self, schema: Schema) -> None:
        self._unknown_row = {
            name: schema.limit(name) - 1
            for name in schema.columns
            if (vocabulary := schema.vocabulary_of(name)) is not None and vocabulary.kind != "hash"
        }
        self._counts = {name: torch.zeros(2, dtype=torch.int64) for name in self._unknown_row}
        self._history = schema.history

    def add(self, batch: Batch) -> None:
        for features in (batch.sparse_features, batch.sequence_features):
            for name in features.keys() if features is not None else ():
                if name in self._counts:
                    ids = self._feature_ids(batch, features, name)
                    unknown = (ids.values == self._unknown_row[name]) & ids.counts
                    self._counts[name] += torch.stack([ids.counts.sum(), unknown.sum()])

    def _feature_ids(self, batch: Batch, features: KeyedJaggedTensor, name: str) -> _Ids:
        if name != self._history:
            return _Ids.of(batch, features, name)
        ids = batch.history.items[batch.history.index]  # padding rows have no history
        return _Ids(ids, torch.ones_like(ids, dtype=torch.bool))

    def totals(self, group: dist.ProcessGroup | None = None) -> dict[str, dict[str, int]]:
        """Return, by column, the number of ids on all ranks and of unknown ones. A collective."""
        if not self._counts:
            return {}
        counts = torch.stack(list(self._counts.values()))
        if group is not None:
            dist.all_reduce(counts, group=group)
        return {
            name: {"ids": ids, "unknown": unknown}
            for name, (ids, unknown) in zip(self._counts, counts.tolist(), strict=True)
        }


def format_unknown(what: str, totals: dict[str, dict[str, int]]) -> str | None:
    """Return a line about the unknown ids of a split; None if no column can have any."""
    if not totals:
        return None
    parts = [
        f"{name} {total['unknown']:,} of {total['ids']:,}"
        + (f" ({total['unknown'] / total['ids']:.2%})" if total["ids"] else "")
        for name, total in totals.items()
    ]
    return f"{what}: unknown ids: {', '.join(parts)}"
