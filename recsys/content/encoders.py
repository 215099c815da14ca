"""Encoders: content of the unique items -> tokens for the fusion.

Every encoder splits into a frozen part, `frozen(input)`, which gives the same output for an item
at every step and may therefore be cached on disk, and `forward(input)`, which runs what is left.
LoRA (peft) adapts the top layers only, so all layers below belong to the frozen part; a fully
frozen encoder is frozen altogether and a fully trained one not at all.

Shapes: U unique items, T tokens, D width of the encoder.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from recsys.batch import ContentInput
from recsys.config import ModalitySettings
from recsys.content.pretrained import load_module, load_transformer

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, red green blue, on the scale 0 to 1
IMAGE_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """Interface of all encoders.

    Attributes:
        output_dim: D of the tokens.
        caches: whether `frozen` is worth caching, that is, whether it does anything.
        is_cached: batches already carry the outputs of `frozen`.
    """

    output_dim: int
    caches: bool
    is_cached: bool = False

    def encode(self, content: ContentInput) -> ContentInput:
        """Both parts: content of a batch -> tokens [U, T, D] and their mask [U, T]."""
        if not self.is_cached:
            with torch.no_grad():
                content = self.frozen(content)
        return cast(ContentInput, self(content))

    def drop_frozen_layers(self) -> None:
        """Frees what `frozen` needs, once its outputs come from a cache."""
        self.is_cached = True

    def frozen(self, content: ContentInput) -> ContentInput:
        """The part that never changes; the identity where there is none."""
        return content

    def forward(self, content: ContentInput) -> ContentInput:
        """What is left after `frozen`: tokens [U, T, D] and their mask [U, T]."""
        raise TypeError(f"{type(self).__name__} defines no forward")


class StoredFeatures(Encoder):
    """Features from Parquet, already tokens."""

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.caches = False

    def forward(self, content: ContentInput) -> ContentInput:
        return content


def normalize_pixels(pixels: Tensor) -> Tensor:
    """uint8 [U, 3, H, W] -> float, normalised as ImageNet encoders expect."""
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


class ModuleEncoder(Encoder):
    """Any torch module over pixels: [U, 3, H, W] -> [U, D] or [U, T, D], frozen or trained."""

    def __init__(self, module: nn.Module, trained: bool, image_size: int) -> None:
        super().__init__()
        self.module = module.requires_grad_(trained)
        self.caches = not trained
        with torch.no_grad():
            probe = module.eval()(torch.zeros(1, 3, image_size, image_size))
        self.output_dim = int(probe.shape[-1])

    def train(self, mode: bool = True) -> ModuleEncoder:
        super().train(mode)
        if self.caches:  # frozen: normalisation statistics must not move either
            self.module.eval()
        return self

    def drop_frozen_layers(self) -> None:
        super().drop_frozen_layers()
        self.module = nn.Identity()

    def _encode(self, content: ContentInput) -> ContentInput:
        tokens = self.module(normalize_pixels(content.values))
        tokens = tokens.unsqueeze(1) if tokens.dim() == 2 else tokens
        return ContentInput(tokens, content.mask.expand(-1, tokens.shape[1]))

    def frozen(self, content: ContentInput) -> ContentInput:
        return self._encode(content) if self.caches else content

    def forward(self, content: ContentInput) -> ContentInput:
        return content if self.caches else self._encode(content)


class TransformerEncoder(Encoder):
    """A transformers text or vision model, run from any layer.

    Args:
        model: with `embeddings` and one ModuleList of layers (BERT, RoBERTa, ViT, CLIP ... style).
        modality: `training`, `lora` and `pooling` are read.
        where: the setting, for messages.

    Raises:
        ValueError: the model is not of that form, or LoRA finds none of its targets.
    """

    def __init__(self, model: nn.Module, modality: ModalitySettings, where: str) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config
        self.output_dim = int(self.config.hidden_size)
        self.is_text = modality.kind == "text"
        self.pooling = modality.pooling
        self.training_mode = modality.training
        layers = self._layers(where)
        self.first_trained = {
            "frozen": len(layers),
            "lora": len(layers) - modality.lora.top_layers,
            "full": 0,
        }[modality.training]
        self.caches = modality.training != "full"
        if not 0 <= self.first_trained <= len(layers):
            raise ValueError(
                f"{where}.lora.top_layers is {modality.lora.top_layers}; the encoder has "
                f"{len(layers)} layers"
            )
        model.requires_grad_(modality.training == "full")
        if modality.training == "lora":
            self._add_lora(modality, where)

    def _layers(self, where: str) -> nn.ModuleList:
        """The stack of layers, whatever the model calls it."""
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers:
                return module
        raise ValueError(
            f"{where}: {type(self.model).__name__} has no stack of {self.config.num_hidden_layers} "
            "layers; use an encoder of BERT, ViT or CLIP type"
        )

    def _add_lora(self, modality: ModalitySettings, where: str) -> None:
        lora = modality.lora
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            layers_to_transform=list(range(self.first_trained, self.config.num_hidden_layers)),
        )
        try:
            inject_adapter_in_model(settings, self.model)
        except ValueError as error:
            raise ValueError(
                f"{where}.lora.targets {lora.targets} fit no layer of {type(self.model).__name__}: "
                f"{error}"
            ) from error

    def drop_frozen_layers(self) -> None:
        """Frees the layers whose outputs come from a cache; parameter names stay."""
        super().drop_frozen_layers()
        layers = self._layers("")
        for index in range(self.first_trained):
            layers[index] = nn.Identity()
        self.model.embeddings = nn.Identity()

    def _run_layers(self, hidden: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        # An item without text attends to its padding, or softmax over nothing would give NaN;
        # its own mask still says that the result is no token.
        attended = (mask | ~mask.any(dim=1, keepdim=True)).long() if self.is_text else None
        attention = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attended
        )
        for layer in self._layers("")[first:last]:
            hidden = layer(hidden, attention)
        return hidden

    def _embed(self, content: ContentInput) -> ContentInput:
        if self.is_text:
            return ContentInput(self.model.embeddings(input_ids=content.values), content.mask)
        hidden = self.model.embeddings(normalize_pixels(content.values))
        if hasattr(self.model, "pre_layrnorm"):  # CLIP
            hidden = self.model.pre_layrnorm(hidden)
        return ContentInput(hidden, content.mask.expand(-1, hidden.shape[1]))

    def _finish(self, hidden: Tensor, mask: Tensor) -> ContentInput:
        """Last norm where the model has one on all tokens, then pooling."""
        if hasattr(self.model, "layernorm"):  # ViT
            hidden = self.model.layernorm(hidden)
        if self.pooling == "none":
            return ContentInput(hidden, mask)
        known = mask.any(dim=1, keepdim=True)
        if self.pooling == "cls":
            return ContentInput(hidden[:, :1], known)
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        mean = (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
        return ContentInput(mean, known)

    def frozen(self, content: ContentInput) -> ContentInput:
        """Embeddings and the layers below the lowest trained one; pooled if all are frozen."""
        if self.training_mode == "full":
            return content
        hidden = self._embed(content)
        values = self._run_layers(hidden.values, hidden.mask, 0, self.first_trained)
        if self.training_mode == "frozen":
            return self._finish(values, hidden.mask)
        return ContentInput(values, hidden.mask)

    def forward(self, content: ContentInput) -> ContentInput:
        if self.training_mode == "frozen":
            return content
        if self.training_mode == "full":
            content = self._embed(content)
        values = self._run_layers(
            content.values, content.mask, self.first_trained, self.config.num_hidden_layers
        )
        return self._finish(values, content.mask)


def build_encoder(name: str, modality: ModalitySettings, feature_dim: int | None) -> Encoder:
    """The encoder of one modality.

    Args:
        name: the modality, for messages.
        modality: its settings.
        feature_dim: width of the stored features (kind `feature`).
    """
    where = f"content.modalities.{name}"
    if modality.kind == "feature":
        assert feature_dim is not None
        return StoredFeatures(feature_dim)
    if modality.module:
        module = load_module(modality.module, where)
        return ModuleEncoder(module, modality.training == "full", modality.image_size)
    assert modality.encoder
    model = load_transformer(modality.encoder, modality.revision, where)
    return TransformerEncoder(model, modality, where)
