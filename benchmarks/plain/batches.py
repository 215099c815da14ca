"""Inputs of the plain twin: padded batches, features of all items, and its sizes.

Shapes: B batch, L longest history, I items, E width of a feature.

Everything is read through the product's data layer, so that product and twin see the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain.twin import PaddedBatch, PlainTwin, TwinSizes
from recsys.config import Config, content_settings
from recsys.content.build import build_content_store
from recsys.data.batch import Batch
from recsys.data.filesystem import Location
from recsys.data.interactions import BatchBuilder, Interactions, loader
from recsys.data.items.content_store import ContentStore
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema, load_schema
from recsys.distributed.ranks import Ranks
from recsys.model.tables import pooled_features
from recsys.ranking.din import DinDcnSettings


class PlainSource:
    """Batches and sizes for a twin of `config` on a dataset.

    Raises:
        ValueError: the twin does not support the configuration: no content, encoders, items with
            missing content, other losses or another fusion.
    """

    def __init__(self, config: Config, data: str, ranks: Ranks) -> None:
        """Load the schema and the features of all items."""
        self.config, self.ranks = config, ranks
        self.root = Location.of(data)
        self.schema = load_schema(self.root)
        content = content_settings(config)
        if content is None or any(m.kind != "feature" for m in content.modalities.values()):
            raise ValueError(
                "the plain twin encodes stored features; give content.modalities of kind feature"
            )
        if others := [name for name in self.schema.event_columns if name != self.schema.history]:
            raise ValueError(f"the plain twin reads one history alone; leave out {others}")
        if ranks.device.type != "cpu":
            raise ValueError("the plain twin runs on CPU; set device to cpu")
        if (content.fusion.name, content.fusion.preset) != ("qformer", "modern"):
            raise ValueError(
                f"the plain twin has no fusion '{content.fusion.name}' of preset "
                f"'{content.fusion.preset}'; use qformer and modern"
            )
        self.content = content
        store, _ = build_content_store(config, content, self.root, self.schema, ranks)
        self.features = features_of_all_items(store, self.schema)

    def twin(self) -> PlainTwin:
        """Build a new twin, with weights from the configuration's seed."""
        torch.manual_seed(self.config.seed)
        return PlainTwin(self.sizes(), list(self.features.values()))

    def sizes(self) -> TwinSizes:
        """Return the sizes of the twin, from the configuration and the data."""
        config, content, schema = self.config, self.content, self.schema
        ranking = config.ranking
        assert isinstance(ranking, DinDcnSettings)
        return TwinSizes(
            pooled_rows=[
                schema.limit(schema.table_of(name)) for name in pooled_features(config, schema)
            ],
            num_items=schema.limit(schema.target_item),
            feature_dims={name: values.shape[1] for name, values in self.features.items()},
            num_dense=len(schema.of_kind("dense")),
            num_parallel=len(schema.parallel),
            id_dim=config.embedding.dim,
            content_dim=content.dim,
            num_queries=content.fusion.num_queries,
            num_layers=content.fusion.num_layers,
            num_heads=content.fusion.num_heads,
            fusion_dropout=content.fusion.dropout,
            attention_units=ranking.attention_units,
            cross_layers=ranking.cross_layers,
            cross_rank=ranking.cross_rank,
            mlp_units=ranking.mlp_units,
            dropout=ranking.dropout,
            contrastive_weight=config.contrastive.weight,
            contrastive_dim=config.contrastive.dim,
            temperature=config.contrastive.temperature,
        )

    def batches(self) -> Iterator[PaddedBatch]:
        """Yield the training batches of this rank, without end."""
        rows = ParquetRows.of_split(self.root, "train", self.schema)
        build = BatchBuilder(self.schema, pooled_features(self.config, self.schema))
        interactions = Interactions(
            rows,
            build,
            self.config.batch_size,
            self.ranks.rank,
            self.ranks.world_size,
            self.config.seed,
        )
        for epoch in itertools.count():
            interactions.begin(epoch)
            for batch in loader(interactions, 0, pin_memory=False):
                yield padded(batch)


def features_of_all_items(store: ContentStore, schema: Schema) -> dict[str, Tensor]:
    """Return the features [I, E] by modality, one token per item, none missing.

    Raises:
        ValueError: an item lacks a modality, or has several tokens of it.
    """
    features = {}
    for name, part in store.gather(np.arange(schema.num_items)).items():
        if part.values.shape[1] != 1 or not part.mask.all():
            raise ValueError(
                f"modality '{name}': the plain twin wants one feature vector of every item; use a "
                "dataset of benchmarks.dataset"
            )
        features[name] = part.values[:, 0].contiguous()
    return features


def padded(batch: Batch) -> PaddedBatch:
    """Return the same impressions with histories padded to the longest."""
    lengths = batch.history_lengths
    mask = torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]  # [B, L]
    history = torch.zeros(mask.shape, dtype=torch.int64)
    history[mask] = batch.history_items[batch.history_index]
    parallel = torch.zeros(*mask.shape, batch.history_values.shape[1])
    parallel[mask] = batch.history_values
    pooled = []
    if batch.sparse_features is not None:
        for feature in batch.sparse_features.to_dict().values():
            pooled.append((feature.values(), feature.offsets()[:-1].long()))
    return PaddedBatch(
        pooled=pooled,
        dense=batch.dense_features,
        labels=batch.labels,
        target=batch.target_items,
        history=history,
        parallel=parallel,
        mask=mask,
    )
