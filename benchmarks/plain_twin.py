"""A plain PyTorch baseline (twin) of the same sizes, with padded batches and features of all items.

Product and twin read the same rows through the product's data layer.
Shapes: B batch, L longest history, I items, E width of a feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import Config, content_settings
from recsys.content.build import build_content_store
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions, loader
from recsys.data.items.content_store import ContentStore
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema, load_schema
from recsys.distributed.ranks import Ranks
from recsys.model.tables import pooled_features
from recsys.ranking.settings import DinDcnSettings
from recsys.storage.location import Location


class PlainSource:
    """Batches and sizes for a twin of `config` on a dataset.

    Raises:
        ValueError: the twin does not support the configuration: no content, encoders, items with
            missing content, other losses or another fusion.
    """

    def __init__(self, config: Config, data: str, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.root = Location.of(data)
        self.schema = load_schema(self.root)
        content = content_settings(config.content)
        if content is None or any(m.kind != "feature" for m in content.modalities.values()):
            raise ValueError(
                "the plain twin encodes stored features; give content.modalities of kind feature"
            )
        if sequences := [name for name in self.schema.event_columns if name != self.schema.history]:
            raise ValueError(f"the plain twin reads one history alone; leave out {sequences}")
        if (content.fusion.name, content.fusion.preset) != ("qformer", "modern"):
            raise ValueError(
                f"the plain twin has no fusion '{content.fusion.name}' of preset "
                f"'{content.fusion.preset}'; use qformer and modern"
            )
        self.content = content
        store, _ = build_content_store(content, self.root, self.schema, ranks, config.cache)
        self.features = features_of_all_items(store, self.schema)

    def build_model(self) -> PlainBaseline:
        torch.manual_seed(self.config.seed)
        return PlainBaseline(self.sizes(), list(self.features.values())).to(self.ranks.device)

    def sizes(self) -> BaselineSizes:
        config, content, schema = self.config, self.content, self.schema
        ranking = config.ranking
        assert isinstance(ranking, DinDcnSettings)
        return BaselineSizes(
            pooled_rows=[
                schema.limit(schema.table_of(name))
                for name in pooled_features(config.embedding, schema)
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
        rows = ParquetRows.of_split(self.root, "train", self.schema)
        build = BatchBuilder(self.schema, pooled_features(self.config.embedding, self.schema))
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
                yield padded(batch).to(self.ranks.device)


def features_of_all_items(store: ContentStore, schema: Schema) -> dict[str, Tensor]:
    """Return the features [I, E] by modality, one token per item, none missing.

    Raises:
        ValueError: an item lacks a modality, or has several tokens of it.
    """
    features = {}
    for name, tokens in store.gather(np.arange(schema.num_items)).items():
        if tokens.values.shape[1] != 1 or not tokens.mask.all():
            raise ValueError(
                f"modality '{name}': the plain twin wants one feature vector of every item; use a "
                "dataset of benchmarks.dataset"
            )
        features[name] = tokens.values[:, 0].contiguous()
    return features


def padded(batch: Batch) -> PaddedBatch:
    """Return the same impressions with histories padded to the longest."""
    lengths = batch.history.lengths
    mask = torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]  # [B, L]
    history = torch.zeros(mask.shape, dtype=torch.int64)
    history[mask] = batch.history.items[batch.history.index]
    parallel = torch.zeros(*mask.shape, batch.history.values.shape[1])
    parallel[mask] = batch.history.values
    pooled = []
    if batch.sparse_features is not None:
        for feature in batch.sparse_features.to_dict().values():
            pooled.append((feature.values(), feature.offsets()[:-1].long()))
    return PaddedBatch(
        pooled=pooled,
        dense=batch.dense_features,
        labels=batch.labels,
        target=batch.target.items,
        history=history,
        parallel=parallel,
        mask=mask,
    )


HALF_LIVES = (1.0, 3.0, 10.0)


@dataclass
class PaddedBatch:
    """Impressions with padded histories."""

    pooled: list[tuple[Tensor, Tensor]]  # ids [N] and offsets [B] of each pooled feature
    dense: Tensor  # [B, F]
    labels: Tensor  # [B, 1]
    target: Tensor  # [B]
    history: Tensor  # [B, L], 0 where there is none
    parallel: Tensor  # [B, L, P]
    mask: Tensor  # bool [B, L]

    def to(self, device: torch.device) -> PaddedBatch:
        values = {name: value for name, value in vars(self).items() if name != "pooled"}
        moved = {name: value.to(device) for name, value in values.items()}
        pooled = [(ids.to(device), offsets.to(device)) for ids, offsets in self.pooled]
        return PaddedBatch(pooled=pooled, **moved)


@dataclass
class BaselineSizes:
    """Sizes of the twin, named as in the product's configuration."""

    pooled_rows: list[int]
    num_items: int
    feature_dims: dict[str, int]
    num_dense: int
    num_parallel: int
    id_dim: int
    content_dim: int
    num_queries: int
    num_layers: int
    num_heads: int
    fusion_dropout: float
    attention_units: list[int]
    cross_layers: int
    cross_rank: int
    mlp_units: list[int]
    dropout: float
    contrastive_weight: float
    contrastive_dim: int
    temperature: float


class ItemEncoder(nn.Module):
    """Encodes features of items [..., E] as content vectors [..., D]: projections and Q-Former."""

    def __init__(self, sizes: BaselineSizes) -> None:
        super().__init__()
        dim, dropout = sizes.content_dim, sizes.fusion_dropout
        self.projections = nn.ModuleList(
            nn.Linear(width, dim) for width in sizes.feature_dims.values()
        )
        self.modality = nn.Parameter(torch.randn(len(sizes.feature_dims), dim) * 0.02)
        self.queries = nn.Parameter(torch.randn(sizes.num_queries, dim) * dim**-0.5)
        self.layers = nn.ModuleList()
        for _ in range(sizes.num_layers):
            layer = nn.TransformerEncoderLayer(
                dim, sizes.num_heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
            )
            # As in the product: only on the summand that joins the residual.
            layer.dropout1, layer.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
            self.layers.append(layer)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(sizes.num_queries * dim, dim)
        self.linear = nn.Linear(len(sizes.feature_dims) * dim, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        shape = features[0].shape[:-1]
        tokens = torch.stack(
            [
                projection(values.flatten(0, -2))
                for projection, values in zip(self.projections, features)
            ],
            dim=1,
        )  # [items, M, D]
        queries = self.queries.expand(len(tokens), -1, -1)
        x = torch.cat([queries, tokens + self.modality], dim=1)  # [items, Q + M, D]
        for layer in self.layers:
            x = layer(x)
        outputs = self.norm(x[:, : len(self.queries)]).flatten(1)
        return (self.output(outputs) + self.linear(tokens.flatten(1))).unflatten(0, shape)


class PaddedAttention(nn.Module):
    """Weights padded history items for the target and sums them; subclasses define `scores`."""

    def __init__(self, dim: int, num_parallel: int) -> None:
        super().__init__()
        self.parallel_map = nn.Linear(num_parallel, dim, bias=False)

    def scores(self, target: Tensor, history: Tensor) -> Tensor:  # [B, L]
        """Score each history item [B, L, D] for its target [B, D]."""
        raise TypeError(f"{type(self).__name__} defines no scores")

    def forward(
        self,
        target: Tensor,  # [B, D]
        history: Tensor,  # [B, L, D]
        batch: PaddedBatch,
    ) -> Tensor:  # [B, D]
        history = history + self.parallel_map(batch.parallel)
        scores = self.scores(target, history).masked_fill(~batch.mask, -1e4)
        weights = torch.softmax(scores, dim=1) * batch.mask
        return torch.einsum("bl,bld->bd", weights, history)


def history_numbers(batch: PaddedBatch) -> Tensor:  # [B, P * (1 + H) + 1]
    """Average the parallel lists, once evenly and once per half-life, and append the length."""
    lengths = batch.mask.sum(dim=1, keepdim=True)
    newer = lengths - batch.mask.cumsum(dim=1)  # [B, L]
    means = []
    for values in batch.parallel.unbind(dim=2):
        for weight in (torch.ones_like(values), *(0.5 ** (newer / life) for life in HALF_LIVES)):
            weight = weight * batch.mask
            means.append((values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))
    return torch.stack([*means, torch.log1p(lengths.squeeze(1).float())], dim=1)


class PairAttention(PaddedAttention):
    """DIN: an MLP of (item, target, difference, product)."""

    def __init__(self, dim: int, num_parallel: int, units: list[int]) -> None:
        super().__init__(dim, num_parallel)
        widths = [4 * dim, *units]
        layers: list[nn.Module] = []
        for input_width, output_width in pairwise(widths):
            layers += [nn.Linear(input_width, output_width), nn.ReLU()]
        self.score = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def scores(self, target: Tensor, history: Tensor) -> Tensor:
        query = target.unsqueeze(1).expand_as(history)
        pairs = torch.cat([history, query, history - query, history * query], dim=-1)
        return self.score(pairs).squeeze(-1)


class ProductAttention(PaddedAttention):
    """The scaled dot product with the projected target."""

    def __init__(self, dim: int, num_parallel: int) -> None:
        super().__init__(dim, num_parallel)
        self.query = nn.Linear(dim, dim)

    def scores(self, target: Tensor, history: Tensor) -> Tensor:
        query = self.query(target) * target.shape[-1] ** -0.5
        return torch.einsum("bd,bld->bl", query, history)


class CrossNetwork(nn.Module):
    """DCN-v2 with low rank: x0 * (W V x + b) + x in each layer."""

    def __init__(self, width: int, num_layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(num_layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Cross the features x [B, width] with themselves: [B, width]."""
        first = x
        for down, up in zip(self.down, self.up):
            x = first * up(down(x)) + x
        return x


class PlainBaseline(nn.Module):
    """Maps a padded batch to (loss, logits [B, 1]); `features` are [I, E] by modality."""

    def __init__(self, sizes: BaselineSizes, features: list[Tensor]) -> None:
        super().__init__()
        self.sizes = sizes
        for name, values in zip(sizes.feature_dims, features, strict=True):
            self.register_buffer(f"features_of_{name}", values, persistent=False)
        dim, content_dim, parallel = sizes.id_dim, sizes.content_dim, sizes.num_parallel
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(rows, dim, mode="sum", sparse=True) for rows in sizes.pooled_rows
        )
        self.items = nn.Embedding(sizes.num_items, dim, sparse=True)
        for table in (*self.bags, self.items):
            assert isinstance(table, nn.EmbeddingBag | nn.Embedding)
            nn.init.normal_(table.weight, std=0.01)
        self.encoder = ItemEncoder(sizes)
        self.history_map = nn.Linear(content_dim, content_dim, bias=False)
        nn.init.eye_(self.history_map.weight)
        self.interest = PairAttention(dim, parallel, sizes.attention_units)
        self.content_interest = ProductAttention(content_dim, parallel)
        width = sizes.num_dense + dim * (len(sizes.pooled_rows) + 2) + 2 * content_dim
        width += parallel * (1 + len(HALF_LIVES)) + 1
        self.cross = CrossNetwork(width, sizes.cross_layers, sizes.cross_rank)
        layers: list[nn.Module] = [nn.Dropout(sizes.dropout)]
        for units in sizes.mlp_units:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(sizes.dropout)]
            width = units
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))
        self.content_map = nn.Linear(content_dim, sizes.contrastive_dim)
        self.id_map = nn.Linear(dim, sizes.contrastive_dim)

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """Return the loss [] and the logits [B, 1]."""
        content, content_history = self.encode(batch)
        target = self.items(batch.target)
        logits = self.mlp(
            self.cross(
                torch.cat(
                    [
                        batch.dense,
                        *(bag(*feature) for bag, feature in zip(self.bags, batch.pooled)),
                        target,
                        self.interest(target, self.items(batch.history), batch),
                        history_numbers(batch),
                        content,
                        self.content_interest(content, self.history_map(content_history), batch),
                    ],
                    dim=1,
                )
            )
        )
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        contrastive = self.contrastive(content, target, batch.target)
        return loss + self.sizes.contrastive_weight * contrastive, logits

    def encode(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """Encode targets [B, D] and histories [B, L, D], with gradient."""
        items = torch.cat([batch.target.unsqueeze(1), batch.history], dim=1)  # [B, 1 + L]
        features = [self.get_buffer(f"features_of_{name}") for name in self.sizes.feature_dims]
        encoded = self.encoder([F.embedding(items, values) for values in features])
        return encoded[:, 0], encoded[:, 1:]

    def contrastive(self, content: Tensor, ids: Tensor, items: Tensor) -> Tensor:
        """Compute the loss [] of content and ids [B, D] in both directions, for items [B]."""
        content = F.normalize(self.content_map(content), dim=-1, eps=1e-5)
        ids = F.normalize(self.id_map(ids), dim=-1, eps=1e-5)
        is_same_item = items[:, None] == items[None, :]
        is_same_item.fill_diagonal_(False)
        scores = (content @ ids.T / self.sizes.temperature).masked_fill(is_same_item, -torch.inf)
        rows = torch.arange(len(items), device=items.device)
        return (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T.contiguous(), rows)) / 2

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Build Adagrad for the rows that occur, and AdamW for the rest."""
        tables = [bag.weight for bag in (*self.bags, self.items)]
        names = {id(table) for table in tables}
        dense = [value for value in self.parameters() if id(value) not in names]
        return [torch.optim.Adagrad(tables, lr=0.05), torch.optim.AdamW(dense, lr=1e-3, fused=True)]
