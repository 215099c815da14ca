"""The sizes that a step's cost follows from, read off a model, whole or sharded, and its plan.

What depends on the model is read from the model itself, so that no width is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.types import ShardingPlan

from embeddings import TableConfig
from embeddings.table_memory import TableMemory, table_memory
from recsys.config import CommunicationSettings, Config, ContentSettings
from recsys.content.encoders.build import StoredFeatures, TransformerEncoder
from recsys.data.schema import Schema
from recsys.diagnostics.cost.work import Work
from recsys.model.em3 import EM3
from recsys.optimizer import dense_parameters
from recsys.ranking.din_dcn import DinDcn, DinDcnSettings
from recsys.ranking.layers.attended_features import RowFeatures


@dataclass(frozen=True)
class EncoderSizes:
    """One modality: `dim` wide outputs, one token per item if `pooled`, behind some layers.

    Of the layers that run in a step the first `frozen_layers` never train, the other
    `trained_layers` do, by adapters of `lora_rank` or, where that is 0, altogether.
    """

    name: str
    dim: int
    pooled: bool
    frozen_layers: int = 0
    trained_layers: int = 0
    hidden: int = 0
    intermediate: int = 0
    lora_rank: int = 0
    lora_targets: int = 0
    groups_by_length: bool = False  # in the trained layers, items of like length run together
    image_tokens: int = 0  # that an image's pixels become in a step; 0: they were made before
    is_known: bool = True  # False: its FLOPs are not counted

    @staticmethod
    def of(name: str, encoder: nn.Module) -> EncoderSizes:
        """Of stored features and transformers; of other encoders the width alone is known."""
        width: Any = encoder.output_dim
        if isinstance(encoder, StoredFeatures):
            return EncoderSizes(name, width, pooled=False)
        if not (isinstance(encoder, TransformerEncoder) and _is_plain_stack(encoder)):
            # What is frozen runs once per item, before the training, where it is cached.
            is_known = bool(encoder.is_cached)
            return EncoderSizes(name, width, pooled=False, is_known=is_known)
        layers, first = encoder.config.num_hidden_layers, encoder.first_trained
        adapters = [m for n, m in encoder.named_modules() if n.endswith("lora_A.default")]
        reads_pixels = not encoder.is_text and not encoder.is_cached
        return EncoderSizes(
            name,
            width,
            pooled=encoder.pooling != "none",
            frozen_layers=0 if encoder.is_cached else first,
            trained_layers=layers - first,
            hidden=encoder.config.hidden_size,
            intermediate=encoder.config.intermediate_size,
            lora_rank=adapters[0].weight.shape[0] if adapters else 0,  # type: ignore[index]
            lora_targets=len(adapters) // max(layers - first, 1),
            groups_by_length=encoder.is_text and encoder.pooling != "none",
            image_tokens=image_tokens(encoder.model) if reads_pixels else 0,
        )

    @property
    def trains(self) -> bool:
        return self.trained_layers > 0


def _is_plain_stack(encoder: TransformerEncoder) -> bool:
    """Whether it is of layers of one width, whose costs are known."""
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size")
    return all(hasattr(encoder.config, name) for name in sizes)


def image_tokens(model: Any) -> int:
    """Patches of an image and, unless the vision model says otherwise, one token for the whole."""
    patches = (model.config.image_size // model.config.patch_size) ** 2
    embeddings = getattr(model, "embeddings", None)
    return int(getattr(embeddings, "num_positions", patches + 1))


@dataclass(frozen=True)
class ContentSizes:
    """The content branch; the letters are those of `recsys.content.fusion`."""

    encoders: list[EncoderSizes]
    dim: int
    is_qformer: bool
    num_queries: int
    num_layers: int
    is_modern: bool  # the preset
    mode: str  # of the history
    lora_rank: int
    vector_dim: int  # kept per item
    num_items: int
    bank_placement: str
    num_cosines: int  # spaces in which similarities are taken
    contrastive_dim: int  # 0: no contrastive loss
    contrastive_gathers: bool  # both sides of all ranks
    exchanges: bool  # item vectors between ranks


@dataclass(frozen=True)
class RankingSizes:
    """The default ranking model, `din_dcn`."""

    attention_units: list[int]
    cross_layers: int
    cross_rank: int
    head_widths: list[int]  # of the MLP, from its input to the logits


@dataclass(frozen=True)
class ModelSizes:
    """Everything a step's cost needs besides its batch."""

    tables: list[TableMemory]
    id_dim: int
    num_parallel: int
    # Of any other ranking model than the default one: forward and backward of one row, counted.
    ranking: RankingSizes | tuple[Work, Work]
    dense_parameters: int  # trained ones
    content: ContentSizes | None
    communication: CommunicationSettings
    num_standardized: int  # numbers whose statistics all ranks share

    @staticmethod
    def of(
        config: Config,
        schema: Schema,
        em3: EM3,
        tables: Sequence[TableConfig],
        plan: ShardingPlan,
        counted_ranking: tuple[Work, Work] | None = None,
    ) -> ModelSizes:
        """Of a model before or after sharding.

        Raises:
            ValueError: nothing is known of the costs of the ranking model.
        """
        sizes: RankingSizes | tuple[Work, Work] | None = counted_ranking
        if has_formulas(config, em3):
            assert isinstance(em3.ranking, DinDcn)
            assert isinstance(config.ranking, DinDcnSettings)
            sizes = _ranking_sizes(config.ranking, em3.ranking)
        if sizes is None:
            raise ValueError(
                f"costs of {type(em3.ranking).__name__} are unknown; count them "
                "(`recsys.diagnostics.cost.counted_ranking`) or use din_dcn without an ensemble"
            )
        return ModelSizes(
            tables=[table_memory(table, plan) for table in tables],
            id_dim=next(t.embedding_dim for t in tables if t.name == schema.target_item),
            num_parallel=len(schema.parallel),
            ranking=sizes,
            dense_parameters=sum(p.numel() for p in dense_parameters(em3).values()),
            content=_content_sizes(config, em3),
            communication=config.embedding.communication,
            num_standardized=_num_standardized(em3),
        )


def has_formulas(config: Config, em3: EM3) -> bool:
    """Whether the costs of a ranking model are formulas; those of others are counted."""
    settings = config.ranking
    if not isinstance(em3.ranking, DinDcn) or not isinstance(settings, DinDcnSettings):
        return False
    return settings.ensemble_members == 1


def _num_standardized(em3: EM3) -> int:
    if not isinstance(em3.ranking, RowFeatures) or em3.ranking.standardization is None:
        return 0
    return em3.ranking.standardization.mean.numel()


def _ranking_sizes(settings: DinDcnSettings, ranking: DinDcn) -> RankingSizes:
    linear = [layer for layer in ranking.mlp if isinstance(layer, nn.Linear)]
    widths = [linear[0].in_features, *(layer.out_features for layer in linear)]
    return RankingSizes(
        settings.attention_units, settings.cross_layers, settings.cross_rank, widths
    )


def _content_sizes(config: Config, em3: EM3) -> ContentSizes | None:
    settings, branch = config.content, em3.content
    if not isinstance(settings, ContentSettings) or branch is None:
        return None
    history, fusion = settings.history, settings.fusion
    spaces = 1 + len(settings.modalities) if history.similarity_features else 0
    contrastive = config.contrastive
    return ContentSizes(
        encoders=[EncoderSizes.of(name, encoder) for name, encoder in branch.encoders.items()],
        dim=settings.dim,
        is_qformer=fusion.name == "qformer",
        num_queries=fusion.num_queries,
        num_layers=fusion.num_layers,
        is_modern=fusion.preset == "modern",
        mode=history.mode,
        lora_rank=history.lora_rank,
        vector_dim=settings.vector_dim,
        num_items=branch.bank.num_items if branch.bank is not None else 0,
        bank_placement=history.bank,
        num_cosines=spaces or int(bool(history.simtier_bins or history.sorted_cosines)),
        contrastive_dim=contrastive.dim if contrastive.weight else 0,
        contrastive_gathers=contrastive.all_ranks and contrastive.variant == "in_batch",
        exchanges=settings.dedup == "global",
    )
