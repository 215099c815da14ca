"""Reads the sizes that determine a step's cost from a model (sharded or not) and its plan.

Sizes are read from the modules themselves, or counted while they run.

Shapes: T tokens, D dimension of the input, E dimension of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardingPlan

from embeddings import TableConfig
from embeddings.table_memory import TableMemory, table_memory
from recsys.config import (
    CommunicationSettings,
    Config,
    ContentSettings,
    ModalitySettings,
    ParallelSettings,
    content_settings,
)
from recsys.content.encoders.build import Encoder, StoredFeatures, TransformerEncoder
from recsys.content.history_map import HistoryMap
from recsys.data.batch import Batch, ContentInput
from recsys.data.schema import Schema
from recsys.diagnostics.cost.counted import ItemCost, count_ranking, item_cost
from recsys.diagnostics.cost.work import PartCost
from recsys.kernels import has_native
from recsys.model.em3 import EM3
from recsys.model.tables import pooled_features
from recsys.optimizer import count_state, dense_parameters


@dataclass(frozen=True)
class ModalitySizes:
    """One modality: cost of its encoder and projection, and their number of output tokens.

    fixed_tokens: tokens that the encoder gives for each item; None: as many as the item has.
    groups_by_length: items of similar length run through the encoder together.
    is_known: False where the encoder cannot be counted.
    """

    name: str
    projection: ItemCost
    encoder: ItemCost = field(default_factory=ItemCost)
    fixed_tokens: int | None = None
    groups_by_length: bool = False
    is_known: bool = True

    @staticmethod
    def of(
        name: str,
        encoder: Encoder,
        projection: nn.Module,
        settings: ModalitySettings,
    ) -> ModalitySizes:
        """Count the layers of an encoder that run in a step, and the projection."""
        trains = any(weight.requires_grad for weight in encoder.parameters() if weight.numel())
        width = encoder.output_dim
        of_projection, _ = item_cost(
            projection, lambda n: [_floats(1, n, width, requires_grad=trains)], (1, 2, 3)
        )
        known = partial(ModalitySizes, name, of_projection)
        # A frozen encoder with cached outputs runs once per item, before training.
        if isinstance(encoder, StoredFeatures) or (encoder.is_cached and not trains):
            return known()
        is_text = isinstance(encoder, TransformerEncoder) and encoder.is_text
        lengths = (1, 2, 3) if is_text and encoder.max_length > 2 else (1,)
        try:
            cost, tokens = item_cost(
                _Encoding(encoder), partial(_content_of, encoder, settings, is_text), lengths
            )
        except Exception:  # user code may need real values; describe reports it as not counted
            return known(is_known=False)
        return known(
            cost,
            fixed_tokens=None if tokens == [1, 2, 3] else tokens[0],
            groups_by_length=is_text and settings.pooling != "none",
        )


class _Encoding(nn.Module):
    """The part of an encoder that runs in a step, over tensors."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        values: Tensor,  # [1, T] token ids, [1, T, D] cached outputs or [1, 3, height, width]
        mask: Tensor,  # bool [1, T]
    ) -> Tensor:  # [1, tokens, E]
        """Encode content; frozen layers run without gradient."""
        content = ContentInput(values, mask)
        if self.encoder.caches and not self.encoder.is_cached:
            with torch.no_grad():
                content = self.encoder.frozen(content)
        encoded: ContentInput = self.encoder(content)
        return encoded.values


def _content_of(
    encoder: Encoder, settings: ModalitySettings, is_text: bool, length: int
) -> list[Tensor]:
    """Return values and mask of a text of `length` tokens or of an image, on the meta device."""
    if encoder.is_cached:
        length = length if is_text else encoder.frozen_tokens
        values = _floats(1, length, encoder.frozen_dim)
    elif is_text:
        values = torch.zeros(1, length, dtype=torch.long, device="meta")
    else:
        size = settings.image_size
        values = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    return [values, torch.ones(1, length, dtype=torch.bool, device="meta")]


_floats = partial(torch.empty, device="meta")


@dataclass(frozen=True)
class ContentSizes:
    """Sizes and costs of the content branch."""

    modalities: list[ModalitySizes]
    fusion: ItemCost
    history_map: ItemCost  # a token is a history item
    maps_of_row: int  # products of a row with the map's matrix by kernels; 0: items are mapped
    maps_lengths: bool  # whether kernels compute the lengths of mapped items
    dim: int
    mode: str  # content.history.mode
    vector_dim: int  # numbers kept per item
    num_items: int
    bank_placement: str
    contrastive_dim: int  # 0: no contrastive loss
    contrastive_gathers: bool  # whether it gathers both sides of all ranks
    exchanges: bool  # whether ranks exchange item vectors

    @staticmethod
    def of(config: Config, em3: EM3) -> ContentSizes | None:
        """Count the content branch; None without one."""
        settings, branch = content_settings(config), em3.content
        if settings is None or branch is None:
            return None
        dim, count = settings.dim, len(branch.encoders)

        def tokens(length: int) -> list[Tensor]:
            mask = torch.ones(1, length, dtype=torch.bool, device="meta")
            modality = torch.zeros(length, dtype=torch.long, device="meta")
            return [_floats(1, length, dim, requires_grad=True), mask, modality]

        is_full, contrastive = settings.history.mode == "full", config.contrastive
        return ContentSizes(
            modalities=[
                ModalitySizes.of(name, encoder, branch.projections[name], settings.modalities[name])
                for name, encoder in branch.encoders.items()
                if isinstance(encoder, Encoder)
            ],
            fusion=item_cost(branch.fusion, tokens, range(count, count + 3))[0],
            history_map=item_cost(
                branch.history_map, lambda n: [_floats(n, dim, requires_grad=is_full)], (1, 2, 3)
            )[0],
            maps_of_row=_maps_of_row(settings, branch.history_map),
            maps_lengths=settings.history.similarity_features,
            dim=dim,
            mode=settings.history.mode,
            vector_dim=settings.vector_dim,
            num_items=branch.bank.num_items if branch.bank is not None else 0,
            bank_placement=settings.history.bank,
            contrastive_dim=contrastive.dim if contrastive.weight else 0,
            contrastive_gathers=contrastive.all_ranks and contrastive.variant == "in_batch",
            exchanges=settings.dedup == "global",
        )


def _maps_of_row(settings: ContentSettings, history_map: HistoryMap) -> int:
    """Return how many vectors of a row kernels map in place of its history's items.

    These are the query, the weighted sum and, with similarities, the target
    (`recsys.ranking.layers.content_interest`).
    """
    history, weight = settings.history, next(history_map.parameters())
    if history.mode == "full" or history.simtier_bins or history.sorted_cosines:
        return 0
    if weight.device.type != "cpu" or not has_native(weight):
        return 0
    return 2 + history.similarity_features


@dataclass(frozen=True)
class ModelSizes:
    """All sizes that determine a step's cost, except those of its batch."""

    tables: list[TableMemory]
    id_dim: int
    ranking: list[PartCost]  # cost of one row
    dense_parameters: int  # number of trained dense parameters
    optimizer_state: int  # elements that the dense optimizer and the moving average keep
    content: ContentSizes | None
    communication: CommunicationSettings
    parallel: ParallelSettings
    num_standardized: int  # features whose statistics are summed over ranks

    @staticmethod
    def of(
        config: Config,
        schema: Schema,
        em3: EM3,
        tables: Sequence[TableConfig],
        plan: ShardingPlan,
        batch: Batch,
    ) -> ModelSizes:
        """Count the sizes of a model, sharded or not; `batch` gives the lengths of histories.

        A collective where the model standardizes numbers over several ranks.
        """
        dims = {table.name: table.embedding_dim for table in tables}
        id_dim = dims[schema.table_of(schema.target_item)]
        dense = {name: part.shape for name, part in dense_parameters(em3).items()}
        standardization = getattr(em3.ranking, "standardization", None)
        return ModelSizes(
            tables=[table_memory(table, plan) for table in tables],
            id_dim=id_dim,
            ranking=count_ranking(
                em3.ranking,
                [dims[schema.table_of(name)] for name in pooled_features(config, schema)],
                id_dim,
                content_settings(config),
                batch,
                em3.read_ids.history_is_unique and not em3.read_ids.beside,
                em3.further_histories,
            ),
            dense_parameters=sum(size.numel() for size in dense.values()),
            optimizer_state=sum(count_state(config.optimizer, dense).values()),
            content=ContentSizes.of(config, em3),
            communication=config.embedding.communication,
            parallel=config.embedding.parallel,
            num_standardized=0 if standardization is None else standardization.mean.numel(),
        )
