"""Settings of the content branch, `content` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from recsys.config.limits import (
    Dropout,
    NonNegativeInt,
    Pixels,
    PositiveInt,
    PositiveShare,
    Width,
    refuse_options,
)
from recsys.config.named_parts import find_part


@dataclass
class LoraSettings:
    """Low-rank adapters inside an encoder (peft)."""

    rank: PositiveInt = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Scale of the adapters: alpha / rank times their output is added."""
    dropout: Dropout = 0.0
    """Dropout of the adapters' inputs."""
    targets: list[str] = field(default_factory=lambda: ["query", "value"])
    """Names of adapted linear layers inside the model, or "all-linear"."""
    top_layers: PositiveInt = 1
    """Number of highest layers that are adapted."""
    layers: list[int] | None = None
    """First and last adapted layer, counted from 0; instead of `top_layers`."""
    use_dora: bool = False
    """Adapt direction and magnitude of weights separately (DoRA)."""

    def check(self, name: str) -> None:
        layers = self.layers
        if layers is not None and (len(layers) != 2 or not 0 <= layers[0] <= layers[1]):
            raise ValueError(
                f"{name}.layers is {layers}; give the first and the last adapted layer, counted "
                "from 0, such as [2, 5]"
            )


@dataclass
class ModalitySettings:
    """One source of content tokens: a column of the items and its encoder."""

    kind: str
    """text, image, feature, frames, terms, or a class of your own as `package.module:Class`."""
    column: str
    """Column of the items' Parquet files."""
    encoder: str | None = None
    """A transformers model: hub name, folder, or `package:NAME` for a folder inside an installed
    package. Text needs one; an image has either this or `module`; a feature has neither."""
    module: str | None = None
    """Any torch module for images, `package.module:factory`; [U, 3, H, W] -> [U, D] or
    [U, T, D]."""
    training: Literal["frozen", "side", "lora", "full"] = "frozen"
    """Trained part of the encoder: nothing, a small network over the states of its frozen layers,
    adapters, or all of it."""
    side_width: PositiveInt = 32
    """Width of the bottlenecks of `training: side`."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    pooling: Literal["mean", "cls", "last", "none", "projected"] = "mean"
    """Pooling of the last hidden states into tokens for the fusion. projected: the model's own
    pooled output, which dual encoders such as CLIP map into one space for texts and images."""
    max_length: PositiveInt = 32
    """Text tokens, or terms, per item."""
    separator: str | None = None
    """Characters, each of which separates terms of kind `terms`, such as ",;"; null: terms are
    words."""
    num_embeddings: PositiveInt = 16384
    """Embeddings of kind `terms`; a hash of a term chooses its own."""
    embedding_dim: PositiveInt = 256
    """Width of the embeddings of kind `terms`."""
    image_size: Pixels = 224
    """Height and width of images, in pixels."""
    max_images: PositiveInt = 1
    """Images, or frames, per item: the first `max_images` of a list."""
    activation_checkpointing: bool = False
    """Recompute activations of trained layers in the backward pass instead of keeping them."""
    cache_frozen_layers: bool = True
    """Cache the outputs of the frozen layers below the lowest trained one on disk, per item."""
    revision: str | None = None
    """Revision of a hub encoder."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a class of your own."""

    def check(self, name: str) -> None:
        make_kind = find_part(f"{name}.kind", "recsys.data.items.kind:make_kind", {})
        make_kind(name, self)  # raises for settings that the kind refuses
        if self.module and self.training in ("lora", "side"):
            raise ValueError(
                f"{name}: training {self.training} needs a transformers `encoder`; a `module` is "
                "frozen or full"
            )
        if self.training == "side" and self.pooling in ("none", "projected"):
            raise ValueError(
                f"{name}: training side reads one vector per layer; set pooling to mean, cls or "
                f"last, not {self.pooling}"
            )
        has_trained_layers = self.training in ("lora", "full") and self.encoder
        if self.activation_checkpointing and not has_trained_layers:
            raise ValueError(
                f"{name}: activation_checkpointing is for the trained layers of a transformers "
                "`encoder`; set `training: lora` or `full`, or remove it"
            )


@dataclass
class FusionSettings:
    """Fusion of the tokens of all modalities into one content vector per item."""

    name: str = "qformer"
    """qformer, concat, or a class of your own as `package.module:Class`."""
    preset: Literal["published", "modern"] = "modern"
    """Layers of the qformer as published, or pre-norm with masks and modality embeddings."""
    num_queries: PositiveInt = 2
    """Learned queries of the qformer."""
    num_layers: PositiveInt = 1
    """Layers of the qformer."""
    num_heads: PositiveInt = 4
    """Attention heads of the qformer; their number divides `content.dim`."""
    dropout: Dropout = 0.1
    """Dropout inside the fusion."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a class of your own."""

    def check(self, name: str) -> None:
        refuse_options(name, self.name, self.options)


@dataclass
class HistorySettings:
    """Source and use of the content vectors of history items."""

    mode: Literal["bank_lora", "bank_frozen", "bank_dense", "full"] = "bank_lora"
    """bank_lora, bank_frozen, bank_dense: vectors of the memory bank, mapped by a frozen map plus a
    low-rank one, a frozen map, or a dense one; full: encoded again with gradient."""
    lora_rank: int = 4
    """Rank of the low-rank map of bank_lora."""
    lora_alpha: float = 8.0
    """Scale of the low-rank map: alpha / rank times its output is added."""
    similarity_features: bool = True
    """Cosine of the target to liked and other history items, of content vectors and per
    modality."""
    simtier_bins: NonNegativeInt = 0
    """Number of bins of a histogram of those cosines (SimTier); 0: none."""
    recent: list[PositiveInt] = field(default_factory=list)
    """Sizes of groups of a row's latest items: with [5], similarities to the latest 5 items and to
    the others are features, too, and content attention knows which items these are."""
    top_k: NonNegativeInt = 0
    """Keep only the top-k items of each row's first history by cosine similarity to the target's
    content, prior to any other use of the history (MUSE); 0: all."""
    bank: Literal["auto", "sharded", "replicated"] = "auto"
    """sharded: each rank keeps a block of the rows of the bank; replicated: each keeps all rows, so
    that reads need no communication; auto: replicated up to 256 MiB and 16 ranks."""
    refresh_bank_every_epoch: bool = False
    """Encode all items again before each validation."""
    columns: list[str] = field(default_factory=list)
    """Further sequences of target items whose items' content is read, besides the first."""


@dataclass
class ContentSettings:
    """The content branch; `content: none` instead gives the ID-only baseline."""

    modalities: dict[str, ModalitySettings]
    """Sources of content, by names that you choose."""
    dim: Width = 32
    """Width of the content vectors."""
    fusion: FusionSettings = field(default_factory=FusionSettings)
    history: HistorySettings = field(default_factory=HistorySettings)
    dedup: Literal["local", "global"] = "local"
    """local: each rank encodes the unique items of its batch; global: the unique items of the
    batches of all ranks are encoded once, each by the rank that owns its id."""
    encoder_share: PositiveShare = 1.0
    """Share of a step's items for which trained encoders run. The others take their last outputs,
    while projections and fusion train on every item. Below 1 these encoders have no dropout."""

    @property
    def vector_dim(self) -> int:
        """Width of an item's row in the bank: content vector and one mean token per modality."""
        return self.dim * (1 + len(self.modalities) * self.history.similarity_features)

    def check(self, name: str) -> None:
        if not self.modalities:
            raise ValueError(
                f"{name}.modalities is empty; name at least one modality, or set `content: none`"
            )
        for modality in self.modalities:
            if not isinstance(modality, str) or not modality or "." in modality:
                raise ValueError(
                    f"{name}.modalities: {modality!r} is no name; use text without a dot, as it is "
                    "part of the names of parameters"
                )
        heads, rank = self.fusion.num_heads, self.history.lora_rank
        if self.fusion.name == "qformer" and self.dim % heads:
            raise ValueError(
                f"{name}.dim is {self.dim}; it must be a multiple of {name}.fusion.num_heads, "
                f"which is {heads}"
            )
        if self.history.mode == "bank_lora" and not 0 < rank <= self.dim:
            raise ValueError(
                f"{name}.history.lora_rank is {rank}; it must lie in [1, {name}.dim = {self.dim}]"
            )
        if self.history.columns and self.history.top_k:
            raise ValueError(
                f"{name}.history.top_k is {self.history.top_k}, which shortens the first history "
                f"alone, but {name}.history.columns is {self.history.columns}; set top_k to 0"
            )
        if self.history.recent and self.history.top_k:
            raise ValueError(
                f"{name}.history.top_k is {self.history.top_k}, which takes items out of the "
                f"history, so that {name}.history.recent {self.history.recent} cannot count the "
                "latest; set one of them alone"
            )
        if self.encoder_share < 1:
            self._check_sampled_encoders(name)
        if self.history.mode == "full" and (self.encoder_share < 1 or self.history.top_k):
            setting = "encoder_share" if self.encoder_share < 1 else "history.top_k"
            raise ValueError(
                f"{name}.{setting} reads the memory bank, which {name}.history.mode full has not; "
                "choose bank_lora, bank_frozen or bank_dense"
            )

    def _check_sampled_encoders(self, name: str) -> None:
        where = f"{name}.encoder_share is {self.encoder_share}"
        trained = {key: m for key, m in self.modalities.items() if m.training != "frozen"}
        if not trained:
            raise ValueError(
                f"{where}, but no encoder trains; set it to 1, or `training: lora` for a modality"
            )
        for key, modality in trained.items():
            if modality.pooling == "none" or modality.max_images > 1:
                raise ValueError(
                    f"{where}, which keeps one vector per item, but {name}.modalities.{key} has "
                    f"pooling {modality.pooling} and max_images {modality.max_images}; set another "
                    "pooling and max_images 1"
                )
