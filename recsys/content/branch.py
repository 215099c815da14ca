"""The content branch: a batch's items -> their content vectors, each item encoded once.

Shapes: E items that this rank encodes, U unique history items, T tokens, D content dimension,
M modalities, B batch, K drawn negatives, R items that this rank needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_to_all_single
from torch.nn import functional as F

from embeddings import MemoryBank
from recsys.config import ContentSettings, HistorySettings
from recsys.content.encoder_outputs import EncoderOutputs
from recsys.content.encoders.base import Encoder, mean_token
from recsys.content.fusion import build_fusion
from recsys.content.vectors import ContentVectors, ItemRows, StoredHistory
from recsys.data.items.kind import ContentInput

if TYPE_CHECKING:
    from recsys.data.batch import Batch, BatchContent, ItemExchange


class Projection(nn.Linear):
    """A linear map after a fixed shift and scale of the inputs, by default 0 and 1."""

    shift: Tensor  # [E]
    scale: Tensor  # []

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("shift", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(()))

    def scaled(self, inputs: Tensor) -> Tensor:  # [..., E] -> [..., E]
        return (inputs - self.shift).mul_(self.scale)

    def forward(self, inputs: Tensor) -> Tensor:  # [..., E] -> [..., D]
        return super().forward(self.scaled(inputs))


class HistoryMap(nn.Module):
    """Maps content vectors of history items, by the mode of `content.history`.

    W0, the identity, is frozen in `bank_frozen` and trained in `bank_dense` and `full`. `bank_lora`
    adds peft's low-rank map to it, v W0 + (alpha / r) v A B, which starts at zero.
    """

    def __init__(self, dim: int, settings: HistorySettings) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.map.weight)
        self.scaling: float | None = None  # alpha / r of the adapter, if there is one
        self.map.requires_grad_(settings.mode in ("bank_dense", "full"))
        if settings.mode == "bank_lora":
            from peft import LoraConfig, inject_adapter_in_model

            lora = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
                target_modules=["map"],
            )
            inject_adapter_in_model(lora, self)
            self.scaling = settings.lora_alpha / settings.lora_rank

    def forward(self, vectors: Tensor) -> Tensor:  # [U, D] -> [U, D]
        if self.scaling is None:
            return F.linear(vectors, self.map.weight)
        # peft's own forward does the same in more and smaller steps.
        layer: Any = self.map
        reduced = F.linear(vectors, layer.lora_A["default"].weight)
        mapped = F.linear(vectors, layer.base_layer.weight)
        return torch.addmm(mapped, reduced, layer.lora_B["default"].weight.T, alpha=self.scaling)

    def matrix(self) -> Tensor:  # [D, D]
        """Return the map as one matrix: `forward` of a vector v is matrix @ v."""
        if self.scaling is None:
            return self.map.weight
        layer: Any = self.map
        lora_a, lora_b = (adapter["default"].weight for adapter in (layer.lora_A, layer.lora_B))
        return torch.addmm(layer.base_layer.weight, lora_b, lora_a, alpha=self.scaling)


def exchange_vectors(
    vectors: Tensor, exchange: ItemExchange, group: dist.ProcessGroup | None
) -> Tensor:
    """Map [E, D] to the vectors [R, D] that this rank needs, with gradient. A collective."""
    sent = vectors.index_select(0, exchange.rows)
    received = sent.new_empty(sum(exchange.receive_counts), vectors.shape[1])
    exchanged: Tensor = all_to_all_single(
        received, sent, exchange.receive_counts, exchange.send_counts, group=group
    )
    return exchanged


class ContentBranch(nn.Module):
    """Encodes the unique items of a batch and looks up the vectors of its history.

    `bank` has width `settings.vector_dim`, and is None for history mode `full`. `group` has the
    ranks that share items if `settings.dedup` is global; default: all. A modality with the name of
    an attribute of torch.nn.ModuleDict is a ValueError.

    Example::

        import torch
        from embeddings import MemoryBank
        from recsys import ContentBranch
        from recsys.data.batch import ContentInput
        from recsys.config import ContentSettings, ModalitySettings
        from recsys.content.encoders.build import StoredFeatures

        settings = ContentSettings({"photo": ModalitySettings("feature", "photo")}, dim=16)
        bank = MemoryBank(100, settings.vector_dim, "cpu")
        branch = ContentBranch({"photo": StoredFeatures(32)}, settings, bank)
        photos = ContentInput(torch.randn(5, 1, 32), torch.ones(5, 1, dtype=torch.bool))
        vectors = branch.encode({"photo": photos})  # [5, 32]: content vector, mean photo token
    """

    compiled: Callable[..., Tensor] | None = None  # `encode_frozen` as one graph, in training

    def __init__(
        self,
        encoders: dict[str, Encoder],
        settings: ContentSettings,
        bank: MemoryBank | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name in encoders:
            if hasattr(nn.ModuleDict(), name):  # modules are its attributes
                raise ValueError(
                    f"content.modalities.{name}: this name is an attribute of torch.nn.ModuleDict; "
                    f"rename it, for instance to {name}_content"
                )
        self.encoders = nn.ModuleDict(encoders)
        self.projections = nn.ModuleDict(
            {name: Projection(model.output_dim, settings.dim) for name, model in encoders.items()}
        )
        self.fusion = build_fusion(settings.fusion, settings.dim, len(encoders))
        self.dim, self.vector_dim = settings.dim, settings.vector_dim
        self.keeps_modalities = settings.history.similarity_features
        self.history_map = HistoryMap(settings.dim, settings.history)
        self.encodes_history = settings.history.mode == "full"
        assert self.encodes_history == (bank is None)
        self.bank, self.group = bank, group
        self.outputs = EncoderOutputs.from_settings(bank, settings, encoders)
        self.step = 0  # training step, stored with the vectors in the bank

    def encode(
        self,
        content: dict[str, ContentInput],
        encoded_before: Mapping[str, ContentInput] = MappingProxyType({}),
    ) -> Tensor:
        """Return [E, D + M * D]: content vectors, then mean tokens by modality (M = 0 without).

        `encoded_before`: outputs of encoders that do not run again, by modality.
        """
        modules = cast(dict[str, Encoder], self.encoders).items()
        encoders = {name: encoder for name, encoder in modules if name not in encoded_before}
        if self.training and self.compiled is not None:
            frozen = {name: model.above_frozen(content[name]) for name, model in encoders.items()}
            return self.compiled(frozen, dict(encoded_before))
        outputs = {name: encoder.encode(content[name]) for name, encoder in encoders.items()}
        return self._fused({**encoded_before, **outputs})

    def encode_frozen(
        self, frozen: dict[str, ContentInput], encoded_before: dict[str, ContentInput]
    ) -> Tensor:
        """Return `encode` of outputs of the encoders' frozen parts: one graph, if compiled."""
        outputs = {name: self.encoders[name](output) for name, output in frozen.items()}
        return self._fused(encoded_before | outputs)

    def _fused(self, outputs: Mapping[str, ContentInput]) -> Tensor:  # [E, D + M * D]
        tokens, masks, modality, means = [], [], [], []
        for index, name in enumerate(self.encoders):
            projected, mask = self.projections[name](outputs[name].values), outputs[name].mask
            tokens.append(projected)
            masks.append(mask)
            modality.append(torch.full((mask.shape[1],), index, device=mask.device))
            if self.keeps_modalities:
                means.append(mean_token(projected, mask))
        fused = self.fusion(torch.cat(tokens, dim=1), torch.cat(masks, dim=1), torch.cat(modality))
        return torch.cat([fused, *means], dim=1)

    def forward(self, batch: Batch) -> ContentVectors:
        """Return the content vectors of a batch. A collective: all ranks call it equally often."""
        return self._vectors(*self.item_rows(batch), batch.content)

    def of_rows(self, rows: ItemRows, content: BatchContent) -> ContentVectors:
        return self._vectors(rows.items, lambda: rows.history, content)

    def item_rows(self, batch: Batch) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return vectors [R, D + M * D] and a reader of the history's [U, ...]. Collectives."""
        content, bank = batch.content, self.bank
        ids, route = batch.history.items, content.bank_reads
        fresh = self._encode_items(content)  # [E, D + M * D]
        if bank is None:
            items = self._exchanged(fresh, content.exchange)
            encoded = items.index_select(0, content.history_index)
            return items, lambda: encoded
        if self.training:
            # Written before the lookup: vectors just computed on any rank replace stale ones in
            # the histories of all ranks in the same step (LEMUR, 2511.10962).
            write_index = content.write_index  # of items with a row
            vectors = fresh if write_index is None else fresh.index_select(0, write_index)
            bank.update(content.bank_write_rows, vectors, self.step, content.bank_writes)
        read = functools.cache(lambda: bank.lookup(ids, route)[0])
        self.step += self.training
        return self._exchanged(fresh, content.exchange), read

    def _encode_items(self, content: BatchContent) -> Tensor:
        """Encode this rank's items; [E, D + M * D]. With `EncoderOutputs` a collective."""
        if content.vectors is not None:
            return content.vectors
        inputs, count = content.inputs, content.with_gradient
        if self.training and self.outputs is not None:
            return self.encode(inputs, self.outputs.tokens(content, self.step))
        if count is None or count >= len(content.items):
            return self.encode(inputs)
        with torch.no_grad():
            refreshed = self.encode({name: entries[count:] for name, entries in inputs.items()})
        trained = self.encode({name: entries[:count] for name, entries in inputs.items()})
        return torch.cat([trained, refreshed])

    def _vectors(
        self, items: Tensor, history: Callable[[], Tensor], content: BatchContent
    ) -> ContentVectors:  # [R, D + M * D], [U, D + M * D]
        vectors, modalities = self._split(items)
        target, negative = content.target_index, content.negative_index

        def read_history() -> tuple[Tensor, Tensor]:
            stored, stored_modalities = self._split(history())
            return self.history_map(stored), stored_modalities

        def read_stored() -> StoredHistory:
            return StoredHistory(history(), self.history_map.matrix())

        return ContentVectors(
            target=vectors.index_select(0, target),
            history=None,
            target_modalities=modalities.index_select(0, target),
            history_modalities=None,
            negatives=None if negative is None else vectors.index_select(0, negative),
            negative_modalities=None if negative is None else modalities.index_select(0, negative),
            read=read_history,
            read_stored=None if self.bank is None else read_stored,
        )

    def _exchanged(self, items: Tensor, exchange: ItemExchange | None) -> Tensor:  # E -> R
        return items if exchange is None else exchange_vectors(items, exchange, self.group)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        num_modalities = rows.shape[1] // self.dim - 1
        return rows[:, : self.dim], rows[:, self.dim :].reshape(len(rows), num_modalities, self.dim)
