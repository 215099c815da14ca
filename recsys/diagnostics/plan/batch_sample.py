"""Counts the inputs of a step on batches of some training rows.

Only ids are read: rows, lengths of histories, unique items. The effect of settings (searched
histories, sampled items, items shared among ranks) is computed from them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recsys.config import Config, content_settings
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions
from recsys.data.row_source import open_rows
from recsys.diagnostics.cost.batch_counts import BatchCounts, ModalityCounts, lengths_like
from recsys.diagnostics.plan.meta_model import MetaModel
from recsys.model.tables import pooled_features

SAMPLED_BATCHES = 8
MOST_SHARING_RANKS = 64  # batches that are counted together if ranks share items


@dataclass(frozen=True)
class BatchSample:
    """Sampled training rows as batches, and their mean counts."""

    num_rows: int  # rows of the split
    looked_at: int  # rows of the batches
    batches: list[Batch]
    counts: BatchCounts


def sample_batches(meta_model: MetaModel) -> BatchSample:
    """Read the first batches of an epoch.

    Raises:
        ValueError: there is no training split, or a sampled row cannot be used.
    """
    config, schema = meta_model.config, meta_model.schema
    rows = open_rows(config.source, meta_model.root, "train", schema, config.on_bad_row)
    content = content_settings(config)
    build = BatchBuilder(
        schema,
        pooled_features(config, schema),
        encode_history=content is not None and content.history.mode == "full",
        index_dedup=config.embedding.index_dedup,
        content_histories=[] if content is None else content.history.columns,
    )
    number = SAMPLED_BATCHES
    if content is not None and content.dedup == "global":
        number = max(number, min(meta_model.cluster.world_size, MOST_SHARING_RANKS))
    interactions = Interactions(rows, build, config.batch_size, seed=config.seed)
    batches = list(itertools.islice(interactions, number))
    counts = [expected_counts(meta_model, batch, batches) for batch in batches]
    looked_at = sum(batch.batch_size for batch in batches)
    return BatchSample(rows.num_rows, looked_at, batches, BatchCounts.mean(counts))


def expected_counts(meta_model: MetaModel, batch: Batch, batches: list[Batch]) -> BatchCounts:
    """Return the counts of a prepared batch; `batches` are those of ranks that may share items."""
    config = meta_model.config
    content = content_settings(config)
    counts = BatchCounts.of(batch)
    if content is None:
        return replace(counts, encoded=0, with_gradient=0)
    if content.history.top_k:
        counts = _with_short_histories(config, counts, batch, content.history.top_k)
    items: float = counts.encoded
    if content.dedup == "global":
        counts = replace(counts, exchanged=items)
        together = batches[: meta_model.cluster.world_size]
        unique = torch.cat([other.content_items for other in together]).unique()
        items = len(unique) / len(together)
    forward, backward = content.sampling.forward, content.sampling.backward
    encoded = math.ceil(forward * items) if forward < 1 else items
    trained = math.ceil(backward * items) if backward < 1 else items
    return replace(
        counts,
        encoded=encoded,
        with_gradient=trained,
        stored=items - encoded,
        modalities={
            # Lengths distributed like those of the sampled items.
            name: ModalityCounts.of(lengths_like(meta_model.tokens(name), round(encoded)))
            for name in content.modalities
        },
    )


def _with_short_histories(
    config: Config, counts: BatchCounts, batch: Batch, top_k: int
) -> BatchCounts:
    """Return the counts as if the search took the first items; the choice affects only U."""
    lengths: Tensor = batch.history_lengths
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    kept = torch.arange(len(batch.history_index)) - first < top_k
    history, unique = int(kept.sum()), len(batch.history_index[kept].unique())
    targets = counts.rows
    looked_up = unique if config.embedding.index_dedup else history
    return replace(
        counts,
        history=history,
        unique_history=unique,
        looked_up=targets + looked_up,
        unique_looked_up=min(counts.unique_looked_up, targets + looked_up),
    )
