"""Map ids of a batch by bounded vocabularies before it enters the pipeline; count unknown ids.

A bounded vocabulary changes with every batch and is shared by all ranks. So the main thread maps
ids, in the order of the steps. Shapes: B batch, N ids of one feature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.table_state import State
from embeddings.vocabulary.bounded import PIPELINED_STEPS, BoundedVocabulary, VocabularyCounts
from recsys.data.batch import Batch, TargetItems
from recsys.data.schema import Schema

# Batches whose ids are mapped ahead: those in the pipeline, and one in `content.batch_preparation`.
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
                self.by_table[table] = BoundedVocabulary(
                    schema.limit(table),
                    settings.admit_after,
                    settings.half_life,
                    protect_steps=MAPPED_AHEAD,
                    process_group=group,
                )

    @property
    def items(self) -> BoundedVocabulary | None:
        """The vocabulary of the ranked items, if training learns their rows."""
        return self.by_table.get(self.target)

    @property
    def find_items(self) -> Callable[[Tensor], Tensor] | None:
        """Function from raw item ids to rows of the memory bank, or -1; None if ids are rows."""
        return None if self.items is None else self.items.find

    def map_batch(self, batch: Batch, step: int, training: bool) -> None:
        """Replace raw ids by rows in place, in a batch on the host; call it once per batch.

        Only `training` admits and evicts ids, and resets reassigned rows. A collective.
        """
        for table, vocabulary in self.by_table.items():
            names = self.features[table]
            ids = [self._feature_ids(batch, name, training) for name in names]
            raw = [values[counted] for values, counted in ids]
            rows = vocabulary.rows_of(torch.cat(raw), step, training)
            evicted = vocabulary.take_evicted_rows()
            if self.reset is not None and len(evicted):
                self.reset(table, evicted)
            by_feature = rows.split([len(keys) for keys in raw])
            for name, (values, counted), new_rows in zip(names, ids, by_feature, strict=True):
                values.fill_(vocabulary.unknown_row)
                values[counted] = new_rows
                if name == self.history:
                    batch.history = replace(batch.history, items=values.clone())
            if table == self.target:
                items = batch.sequence_features.values()[: batch.batch_size].clone()
                has_row = items != vocabulary.unknown_row
                batch.target = TargetItems(items, batch.target.items, has_row)

    def _feature_ids(self, batch: Batch, name: str, training: bool) -> tuple[Tensor, Tensor]:
        """Return the ids of a feature, and a mask or an index of ids that count as uses.

        Without training, items of padding rows are mapped, too. Each use in a history counts.
        """
        pooled, features = batch.sparse_features, batch.sequence_features
        if pooled is not None and name in pooled.keys():  # noqa: SIM118 - it is no dict
            features = pooled
        values, is_counted = _ids_of(batch, features, name)
        if name == self.history:  # the feature has each item of the histories once
            extra_indices = [history.index for history in batch.history.extras]
            return values, torch.cat([batch.history.index, *extra_indices])
        if name == self.target and not training:
            return values, torch.ones_like(is_counted)
        return values, is_counted

    def counts(self) -> dict[str, VocabularyCounts]:
        return {table: vocabulary.counts() for table, vocabulary in self.by_table.items()}

    def state_dict(self) -> State:
        """Return tensors that torch.distributed.checkpoint saves, and loads in place."""
        return {
            f"{table}.{name}": value
            for table, vocabulary in self.by_table.items()
            for name, value in vocabulary.state_dict().items()
        }


def _ids_of(batch: Batch, features: KeyedJaggedTensor, name: str) -> tuple[Tensor, Tensor]:
    """Return a view of the ids of a feature [N], and which ids belong to no padding row [N]."""
    index = features.keys().index(name)
    first, last = features.offset_per_key()[index : index + 2]
    lengths = features.lengths().view(len(features.keys()), -1)[index]  # [B]
    is_row = batch.rows.positions >= 0
    if (full := batch.history.full) is not None:
        is_row = is_row.new_zeros(len(full.lengths)).index_put((full.rows,), is_row)
    return features.values()[first:last], torch.repeat_interleave(is_row, lengths)


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
                    if name == self._history:  # the feature has each item of the histories once
                        ids = batch.history.items[batch.history.index]
                        is_counted = torch.ones_like(ids, dtype=torch.bool)
                    else:
                        ids, is_counted = _ids_of(batch, features, name)
                    unknown = (ids == self._unknown_row[name]) & is_counted
                    self._counts[name] += torch.stack([is_counted.sum(), unknown.sum()])

    def totals(self, group: dist.ProcessGroup | None = None) -> dict[str, dict[str, int]]:
        """Return by column the number of ids and of unknown ids on all ranks. A collective."""
        if not self._counts:
            return {}
        counts = torch.stack(list(self._counts.values()))
        if group is not None:
            dist.all_reduce(counts, group=group)
        return {
            name: {"ids": ids, "unknown": unknown}
            for name, (ids, unknown) in zip(self._counts, counts.tolist(), strict=True)
        }


def format_unknown(
    title: str,
    totals: dict[str, dict[str, int]],
    changes: Mapping[str, Mapping[str, int]] | None = None,
) -> str | None:
    """Return a line about the unknown ids of a split; None if no column can have any.

    `changes` has the numbers of admitted and evicted ids of bounded vocabularies, by table.
    """
    if not totals:
        return None
    shares = [
        f"{name} {total['unknown']:,} of {total['ids']:,}"
        + (f" ({total['unknown'] / total['ids']:.2%})" if total["ids"] else "")
        for name, total in totals.items()
    ]
    line = f"{title}: unknown ids: {', '.join(shares)}"
    for table, counts in (changes or {}).items():
        line += f"; table '{table}': {counts['admitted']:,} admitted, {counts['evicted']:,} evicted"
    return line
