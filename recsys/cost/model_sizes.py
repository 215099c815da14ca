"""The sizes that a step's cost follows from, read off a built job and its batches.

What depends on the model is read from the model itself, so that no width is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import fmean

from torch import nn

from recsys.batch import Batch
from recsys.build import Job, content_settings, table_configs
from recsys.content.encoders import StoredFeatures, TransformerEncoder
from recsys.ranking.din_dcn import DinDcn


@dataclass(frozen=True)
class BatchCounts:
    """What a step works on, on one rank."""

    rows: float  # B
    pooled_ids: float
    unique_pooled_ids: float
    looked_up: float  # rows of the item table, for targets and histories
    unique_looked_up: float  # of those, rows that get a gradient
    history: float  # N
    unique_history: float  # U
    encoded: float  # E
    with_gradient: float  # of those
    stored: float  # target items read from the bank
    content_tokens: float  # of the items to encode, over all modalities

    @staticmethod
    def of(batch: Batch) -> BatchCounts:
        pooled, encoded = batch.sparse_features, len(batch.content_items)
        looked_up = batch.sequence_features.values()
        trained = encoded if batch.with_gradient is None else min(batch.with_gradient, encoded)
        unique_pooled = 0
        if pooled is not None:
            unique_pooled = sum(
                len(feature.values().unique()) for feature in pooled.to_dict().values()
            )
        return BatchCounts(
            rows=batch.batch_size,
            pooled_ids=pooled.values().numel() if pooled is not None else 0,
            unique_pooled_ids=unique_pooled,
            looked_up=looked_up.numel(),
            unique_looked_up=len(looked_up.unique()),
            history=len(batch.history_index),
            unique_history=len(batch.history_items),
            encoded=encoded,
            with_gradient=trained,
            stored=len(batch.bank_items),
            content_tokens=sum(int(part.mask.sum()) for part in batch.content.values()),
        )

    @staticmethod
    def mean(counts: list[BatchCounts]) -> BatchCounts:
        """Of several steps."""
        names = [item.name for item in fields(BatchCounts)]
        return BatchCounts(**{name: fmean(getattr(c, name) for c in counts) for name in names})


@dataclass(frozen=True)
class EncoderSizes:
    """One modality: `dim` wide outputs, one token per item if `pooled`, behind some layers.

    Of the layers that run in a step the first `frozen_layers` never train, the other
    `trained_layers` do, by adapters of `lora_rank` or, where that is 0, altogether.
    """

    dim: int
    pooled: bool
    frozen_layers: int = 0
    trained_layers: int = 0
    hidden: int = 0
    intermediate: int = 0
    lora_rank: int = 0
    lora_targets: int = 0

    @staticmethod
    def of(encoder: nn.Module) -> EncoderSizes:
        """
        Raises:
            ValueError: nothing is known of the costs of such an encoder.
        """
        if isinstance(encoder, StoredFeatures):
            return EncoderSizes(encoder.output_dim, pooled=True)
        if not isinstance(encoder, TransformerEncoder):
            raise ValueError(
                f"costs of {type(encoder).__name__} are unknown; they are known of stored features "
                "and of transformers"
            )
        layers, first = encoder.config.num_hidden_layers, encoder.first_trained
        adapters = [m for n, m in encoder.named_modules() if n.endswith("lora_A.default")]
        return EncoderSizes(
            encoder.output_dim,
            pooled=encoder.pooling != "none",
            frozen_layers=0 if encoder.is_cached else first,
            trained_layers=layers - first,
            hidden=encoder.config.hidden_size,
            intermediate=encoder.config.intermediate_size,
            lora_rank=adapters[0].weight.shape[0] if adapters else 0,  # type: ignore[index]
            lora_targets=len(adapters) // max(layers - first, 1),
        )

    @property
    def trains(self) -> bool:
        return self.trained_layers > 0


@dataclass(frozen=True)
class ContentSizes:
    """The content branch; the letters are those of `recsys.content.fusion`."""

    encoders: list[EncoderSizes]
    dim: int
    is_qformer: bool
    num_queries: int
    num_layers: int
    has_feed_forward: bool
    mode: str  # of the history
    lora_rank: int
    vector_dim: int  # kept per item
    num_cosines: int  # spaces in which similarities are taken
    contrastive_dim: int  # 0: no contrastive loss
    exchanges: bool  # item vectors between ranks


@dataclass(frozen=True)
class ModelSizes:
    """Everything a step's cost needs besides its batch."""

    pooled_dims: list[int]
    id_dim: int
    num_parallel: int
    attention_units: list[int]
    cross_layers: int
    cross_rank: int
    head_widths: list[int]  # of the MLP, from its input to the logits
    dense_parameters: int  # trained ones
    content: ContentSizes | None
    moment_bytes_per_row: int = 4  # row-wise Adagrad

    @staticmethod
    def of(job: Job) -> ModelSizes:
        em3, settings = job.em3, job.config.ranking
        ranking = em3.ranking
        if not isinstance(ranking, DinDcn):
            raise ValueError(f"costs of {type(ranking).__name__} are unknown; use din_dcn")
        linear = [layer for layer in ranking.mlp if isinstance(layer, nn.Linear)]
        pooled = [] if em3.embedding_bags is None else em3.read_ids.pooled_features
        dims = {table.name: table.embedding_dim for table in table_configs(job.config, job.schema)}
        return ModelSizes(
            pooled_dims=[dims[job.schema.table_of(name)] for name in pooled],
            id_dim=dims[job.schema.target_item],
            num_parallel=len(job.schema.parallel),
            attention_units=settings.attention_units,
            cross_layers=settings.cross_layers,
            cross_rank=settings.cross_rank,
            head_widths=[linear[0].in_features, *(layer.out_features for layer in linear)],
            dense_parameters=sum(
                p.numel() for group in job.adamw.param_groups for p in group["params"]
            ),
            content=_content_sizes(job),
        )


def _content_sizes(job: Job) -> ContentSizes | None:
    settings, branch = content_settings(job.config), job.em3.content
    if settings is None or branch is None:
        return None
    history, fusion = settings.history, settings.fusion
    spaces = 1 + len(settings.modalities) if history.similarity_features else 0
    return ContentSizes(
        encoders=[EncoderSizes.of(encoder) for encoder in branch.encoders.values()],
        dim=settings.dim,
        is_qformer=fusion.name == "qformer",
        num_queries=fusion.num_queries,
        num_layers=fusion.num_layers,
        has_feed_forward=fusion.preset == "modern",
        mode=history.mode,
        lora_rank=history.lora_rank,
        vector_dim=settings.vector_dim,
        num_cosines=spaces or int(bool(history.simtier_bins or history.sorted_cosines)),
        contrastive_dim=job.config.contrastive.dim if job.config.contrastive.weight else 0,
        exchanges=settings.dedup == "global",
    )
