"""The settings of the content branch, `content` in a recipe; see `recsys.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class LoraSettings:
    """Low-rank adapters inside an encoder (peft)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    # Names of linear maps as the model calls them, or "all-linear".
    targets: list[str] = field(default_factory=lambda: ["query", "value"])
    top_layers: int = 1  # adapt this many of the highest layers
    # First and last adapted layer, counted from 0; instead of `top_layers`.
    layers: list[int] | None = None
    use_dora: bool = False  # direction and magnitude of weights apart
    use_rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    # true, false, gaussian, orthogonal, olora, pissa or pissa_niter_N, as in peft.
    init_lora_weights: bool | str = True


@dataclass
class ModalitySettings:
    """One source of content tokens: a column of the items and what encodes it."""

    # text, image, feature, frames, or a class of your own as `package.module:Class`.
    kind: str
    column: str
    # A transformers model: hub name, folder, or `package:NAME` for a folder inside an installed
    # package. Text needs one; an image has either this or `module`; a feature has neither.
    encoder: str | None = None
    # Any torch module for images, `package.module:factory`; [U, 3, H, W] -> [U, D] or [U, T, D].
    module: str | None = None
    training: Literal["frozen", "lora", "full"] = "frozen"
    lora: LoraSettings = field(default_factory=LoraSettings)
    # How the encoder's last hidden states become tokens for the fusion. projected: the model's own
    # pooled output, of dual encoders such as CLIP in the space that texts and images share.
    pooling: Literal["mean", "cls", "last", "none", "projected"] = "mean"
    max_length: int = 32  # text tokens per item
    image_size: int = 224  # pixels, square
    max_images: int = 1  # images, or frames, per item: the first so many of a list
    # Trained layers compute their activations again in the backward pass instead of keeping them.
    activation_checkpointing: bool = False
    # Keep the outputs of the frozen layers below the lowest trained one per item on disk.
    cache_frozen_layers: bool = True
    revision: str | None = None  # of a hub encoder
    options: dict[str, Any] = field(default_factory=dict)  # of a class of your own


@dataclass
class FusionSettings:
    """Tokens of all modalities -> one content vector per item."""

    name: str = "qformer"  # or concat, or a class of your own as `package.module:Class`
    preset: Literal["published", "modern"] = "modern"
    num_queries: int = 2
    num_layers: int = 1
    num_heads: int = 4
    dropout: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)  # of a class of your own


@dataclass
class HistorySettings:
    """How the content of history items is obtained and used."""

    mode: Literal["bank_lora", "bank_frozen", "bank_dense", "full"] = "bank_lora"
    lora_rank: int = 4
    lora_alpha: float = 8.0
    # Cosine of the target to liked and other history items, of content vectors and per modality.
    similarity_features: bool = True
    simtier_bins: int = 0  # a histogram of those cosines with so many bins (SimTier); 0: none
    sorted_cosines: int = 0  # the so many highest cosines as features, sorted (LEMUR); 0: none
    # Keep of each history only the items whose content is most like the target's, so many, before
    # anything else is done with it (MUSE); 0: all.
    top_k: int = 0
    # sharded: each rank keeps a block of the rows of the bank; replicated: each keeps all, so that
    # reading is free; auto: replicated up to 256 MiB and 16 ranks.
    bank: Literal["auto", "sharded", "replicated"] = "auto"
    # Vectors that any rank has just computed are seen in the histories of all ranks in that step.
    same_step: bool = True
    refresh_bank_every_epoch: bool = False  # re-encode all items before each validation


@dataclass
class SamplingSettings:
    """Shares of a step's unique items that are encoded; the others come from the bank (LEMUR)."""

    forward: float = 1.0  # p: encoded anew
    backward: float = 1.0  # q, at most p: encoded with gradient


@dataclass
class ContentSettings:
    """The content branch; `content: none` instead of it gives the ID-only twin."""

    modalities: dict[str, ModalitySettings]
    dim: int = 32
    fusion: FusionSettings = field(default_factory=FusionSettings)
    history: HistorySettings = field(default_factory=HistorySettings)
    # local: each rank encodes the unique items of its batch; global: those of all ranks' batches
    # are encoded once, each by the rank that its id belongs to.
    dedup: Literal["local", "global"] = "local"
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    @property
    def vector_dim(self) -> int:
        """Width of what is kept per item: its content vector and one mean token per modality."""
        return self.dim * (1 + len(self.modalities) * self.history.similarity_features)
