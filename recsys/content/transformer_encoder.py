"""TransformerEncoder: a `transformers` text or vision model that may start at any of its layers.

LoRA (peft) adapts the top layers only, so the embeddings and all layers below are frozen: they
give an item the same hidden states at every step, which may be cached (`frozen_cache`).

Shapes: U unique items, T tokens, D width of the encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from recsys.batch import ContentInput
from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoder import Encoder, mean_token, normalize_pixels

ITEMS_PER_GROUP = 32  # of like length, run through the trained layers together


class TransformerEncoder(Encoder):
    """A transformers text or vision model, run from any layer.

    Args:
        model: with `embeddings` and one ModuleList of layers (BERT, RoBERTa, ViT, CLIP ... style).
        modality: `training`, `lora` and `pooling` are read.
        where: the setting, for messages.

    Raises:
        ValueError: the model is not of that form or gives other hidden states when run layer by
            layer, LoRA finds not all of its targets, or the inputs are larger than it can read.
    """

    def __init__(self, model: nn.Module, modality: ModalitySettings, where: str) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config
        self.output_dim = int(getattr(self.config, "hidden_size", 0))
        self.is_text = modality.kind == "text"
        self.pooling = modality.pooling
        self.training_mode = modality.training
        layers = self._layers(where)
        self.first_trained = self._first_trained(len(layers), modality, where)
        self.caches = modality.training != "full"
        self.max_length = modality.max_length if self.is_text else 1
        self._check_input_size(modality, where)
        self._check_reproduces_model(modality, where)
        if hasattr(model, "post_layernorm"):
            # CLIP's norm of its own pooled output, which no loss here would train.
            model.post_layernorm = nn.Identity()
        model.requires_grad_(modality.training == "full")
        if modality.training == "lora":
            self._add_lora(modality.lora, where)

    def _layers(self, where: str) -> nn.ModuleList:
        """The stack of layers, whatever the model calls it."""
        count = getattr(self.config, "num_hidden_layers", None)
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ValueError(
            f"{where}.encoder: {type(self.model).__name__} has no stack of {count} layers; use an "
            "encoder of BERT, RoBERTa, ViT or CLIP vision type"
        )

    @property
    def trained_layers(self) -> list[nn.Module]:
        """Those that run in every step."""
        return list(self._layers("")[self.first_trained :])

    @staticmethod
    def _first_trained(num_layers: int, modality: ModalitySettings, where: str) -> int:
        """Index of the lowest layer that trains; all below are the frozen part."""
        top_layers = modality.lora.top_layers
        if modality.training == "lora" and not 1 <= top_layers <= num_layers:
            raise ValueError(
                f"{where}.lora.top_layers is {top_layers}; the encoder has {num_layers} layers, "
                f"choose 1 to {num_layers}"
            )
        return {"frozen": num_layers, "lora": num_layers - top_layers, "full": 0}[modality.training]

    def _check_input_size(self, modality: ModalitySettings, where: str) -> None:
        """Longer texts or other images than the position embeddings know would fail in training."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if self.is_text and positions is not None:
            # RoBERTa numbers its positions from behind the padding id.
            embeddings = getattr(self.model, "embeddings", None)
            table = getattr(embeddings, "position_embeddings", None)
            first = getattr(table, "padding_idx", None)
            limit = positions - (0 if first is None else first + 1)
            if modality.max_length > limit:
                raise ValueError(
                    f"{where}.max_length is {modality.max_length}; the encoder reads at most "
                    f"{limit} tokens"
                )
        size = getattr(self.config, "image_size", None)
        if not self.is_text and isinstance(size, int) and size != modality.image_size:
            raise ValueError(
                f"{where}.image_size is {modality.image_size}; the encoder wants {size}"
            )

    @torch.no_grad()
    def _check_reproduces_model(self, modality: ModalitySettings, where: str) -> None:
        """Running layer by layer must give what the model itself gives.

        A model may do more between its layers than is known here (relative positions, a causal
        mask, a norm at the end), which would else go wrong without a word.
        """
        if next(self.model.parameters()).is_meta:  # without weights it shows its sizes alone
            return
        training = self.model.training
        self.model.eval()
        try:
            if self.is_text:
                mask = torch.tensor([[True, True, True, False]])
                values = torch.arange(4)[None] % self.config.vocab_size
                wanted = self.model(input_ids=values, attention_mask=mask.long())
            else:
                mask = torch.ones(1, 1, dtype=torch.bool)
                size = modality.image_size
                values = torch.arange(3 * size * size).view(1, 3, size, size).to(torch.uint8)
                wanted = self.model(pixel_values=normalize_pixels(values))
            embedded = self._embed(ContentInput(values, mask))
            hidden = self._run_layers(embedded.values, embedded.mask, 0, len(self._layers(where)))
            difference = (self._last_norm(hidden) - wanted.last_hidden_state)[embedded.mask]
            cause = f"its hidden states come out wrong by {difference.abs().max():.1e}"
            fits = bool(difference.abs().max() < 1e-3)
        except Exception as error:
            fits, cause = False, f"{type(error).__name__}: {error}"
        if not fits:
            raise ValueError(
                f"{where}.encoder: {type(self.model).__name__} cannot be run layer by layer "
                f"({cause}); use an encoder of BERT, RoBERTa, ViT or CLIP vision type"
            )
        self.model.train(training)

    def _add_lora(self, lora: LoraSettings, where: str) -> None:
        layers = self._layers(where)[self.first_trained :]
        linear = [name for name, part in layers[0].named_modules() if isinstance(part, nn.Linear)]
        for target in lora.targets:
            if not any(f".{name}".endswith(f".{target}") for name in linear):
                raise ValueError(
                    f"{where}.lora.targets: '{target}' fits no linear layer of "
                    f"{type(self.model).__name__}; choose from {linear}"
                )
        if lora.rank < 1 or not lora.targets:
            raise ValueError(
                f"{where}.lora: rank {lora.rank} and targets {lora.targets}; rank must be at least "
                f"1 and targets name some of {linear}"
            )
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
        )
        # Into each layer by itself: peft's choice of layers by index depends on what the model
        # calls its stack.
        for layer in layers:
            inject_adapter_in_model(settings, layer)

    def train(self, mode: bool = True) -> TransformerEncoder:
        """Trained layers alone: the frozen part gives one output per item, whatever it drops."""
        super().train(mode)
        if self.training_mode != "full":
            for part in (self.model.embeddings, *self._layers("")[: self.first_trained]):
                part.eval()
        return self

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

    def _last_norm(self, hidden: Tensor) -> Tensor:
        """Norm of all tokens behind the layers, where the model has one (ViT)."""
        return self.model.layernorm(hidden) if hasattr(self.model, "layernorm") else hidden

    def _finish(self, hidden: Tensor, mask: Tensor) -> ContentInput:
        """The model's last norm, then pooling."""
        hidden = self._last_norm(hidden)
        if self.pooling == "none":
            return ContentInput(hidden, mask)
        known = mask.any(dim=1, keepdim=True)
        if self.pooling == "cls":
            return ContentInput(hidden[:, :1], known)
        return ContentInput(mean_token(hidden, mask).unsqueeze(1), known)

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
        if self.is_text and self.pooling != "none":
            return self._by_length(content)
        return self._trained(content)

    def _trained(self, content: ContentInput) -> ContentInput:
        """The layers from the lowest trained one on."""
        if self.training_mode == "full":
            content = self._embed(content)
        values = self._run_layers(
            content.values, content.mask, self.first_trained, self.config.num_hidden_layers
        )
        return self._finish(values, content.mask)

    def _by_length(self, content: ContentInput) -> ContentInput:
        """`_trained` on items of like length together, so that little is spent on padding."""
        lengths = content.mask.sum(dim=1)
        order = lengths.argsort()
        parts = []
        for items in order.split(ITEMS_PER_GROUP):
            longest = max(int(lengths[items[-1]]), 1)
            parts.append(
                self._trained(
                    ContentInput(content.values[items, :longest], content.mask[items, :longest])
                )
            )
        back = order.argsort()
        return ContentInput(
            torch.cat([part.values for part in parts])[back],
            torch.cat([part.mask for part in parts])[back],
        )
