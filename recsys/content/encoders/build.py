"""The encoders a configuration may name: stored features, any image module, or a transformer.

Shapes: U unique items, T tokens, D width of the encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recsys.config import ModalitySettings
from recsys.content.encoders.base import Encoder, normalize_pixels
from recsys.content.encoders.dual_encoder import take_tower
from recsys.content.encoders.identity import EncoderIdentity, weights_digest
from recsys.content.encoders.preparation import Preparation
from recsys.content.encoders.pretrained import hub_commit, is_on_hub, load_module, load_transformer
from recsys.content.encoders.several_images import SeveralImages
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.batch import ContentInput
from recsys.data.items.images import ImagePreparation

__all__ = ["Encoder", "ModuleEncoder", "StoredFeatures", "TransformerEncoder", "build_encoder"]


class StoredFeatures(Encoder):
    """Features from Parquet, already tokens."""

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.caches = False

    def forward(self, content: ContentInput) -> ContentInput:
        return content


class ModuleEncoder(Encoder):
    """Any torch module over pixels: [U, 3, H, W] -> [U, D] or [U, T, D], frozen or trained.

    Raises:
        ValueError: the module gives something of another shape.
    """

    def __init__(self, module: nn.Module, trained: bool, image_size: int) -> None:
        super().__init__()
        self.module = module.requires_grad_(trained)
        self.caches = not trained
        with torch.no_grad():
            probe = module.eval()(torch.zeros(1, 3, image_size, image_size))
        if not isinstance(probe, torch.Tensor) or probe.dim() not in (2, 3):
            shape = list(probe.shape) if isinstance(probe, torch.Tensor) else type(probe).__name__
            raise ValueError(
                f"image module {type(module).__name__} gives {shape} for one image; it must give "
                "[1, D] or [1, T, D]"
            )
        self.output_dim = int(probe.shape[-1])
        self.frozen_tokens = int(probe.shape[1]) if probe.dim() == 3 else 1

    @property
    def trained_parts(self) -> list[nn.Module]:
        return [] if self.caches else [self.module]

    def frozen_settings(self) -> Any:
        return f"{type(self.module).__module__}.{type(self.module).__qualname__}: {self.module}"

    def train(self, mode: bool = True) -> ModuleEncoder:
        super().train(mode)
        if self.caches:  # frozen: normalisation statistics must not move either
            self.module.eval()
        return self

    def drop_frozen_layers(self) -> None:
        super().drop_frozen_layers()
        self.module = nn.Identity()

    def _encode(self, content: ContentInput) -> ContentInput:
        tokens = self.module(normalize_pixels(content.values, ImagePreparation()))
        tokens = tokens.unsqueeze(1) if tokens.dim() == 2 else tokens
        return ContentInput(tokens, content.mask.expand(-1, tokens.shape[1]))

    def frozen(self, content: ContentInput) -> ContentInput:
        return self._encode(content) if self.caches else content

    def forward(self, content: ContentInput) -> ContentInput:
        return content if self.caches else self._encode(content)


def build_encoder(
    name: str,
    modality: ModalitySettings,
    feature_dim: int | None,
    preparation: Preparation | None = None,
) -> Encoder:
    """The encoder of one modality.

    Args:
        name: the modality, for messages.
        modality: its settings.
        feature_dim: width of the stored features (kind `feature`).
        preparation: of its input, as `load_preparation` read it; None for an encoder that is only
            looked at, which then has no identity.

    Raises:
        ValueError: it cannot be loaded, or does not fit its settings.
    """
    where = f"content.modalities.{name}"
    encoder: Encoder
    if modality.kind == "feature":
        assert feature_dim is not None
        return StoredFeatures(feature_dim)
    if modality.module:
        module = load_module(modality.module, where)
        encoder = ModuleEncoder(module, modality.training == "full", modality.image_size)
        if preparation is not None:
            encoder.identity = _identity(modality.module, None, module, preparation)
    else:
        encoder = _transformer(modality, where, preparation)
    return SeveralImages(encoder) if modality.max_images > 1 else encoder


def _transformer(
    modality: ModalitySettings, where: str, preparation: Preparation | None
) -> TransformerEncoder:
    assert modality.encoder and modality.kind != "feature"
    is_projected = modality.pooling == "projected"
    whole: Any = load_transformer(modality.encoder, modality.revision, where, is_projected)
    commit = hub_commit(modality.encoder, modality.revision)
    tower, projection = take_tower(whole, modality.kind)  # type: ignore[arg-type]
    identity = None
    if preparation is not None:
        weights = nn.ModuleList([tower, projection] if projection is not None else [tower])
        identity = _identity(modality.encoder, commit, weights, preparation)
    encoder = TransformerEncoder(
        tower,
        modality,
        where,
        projection if is_projected else None,
        preparation.images if preparation is not None else None,
    )
    encoder.identity = identity
    if is_on_hub(modality.encoder) and modality.revision is None:
        encoder.notes.append(
            f"{where}.encoder: '{modality.encoder}' is whatever its repository holds at the time; "
            f"pin it by `revision: {commit or 'COMMIT'}`"
        )
    return encoder


def _identity(
    name: str, commit: str | None, weights: nn.Module, preparation: Preparation
) -> EncoderIdentity:
    return EncoderIdentity(name, commit, weights_digest(weights), preparation.digest)
