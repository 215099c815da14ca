"""TransformerEncoder: any `transformers` text or vision model, frozen, with adapters or trained.

Adapters (LoRA) sit in some of its layers. All that lies below the lowest of them is frozen and
gives an item the same hidden states at every step, which may be cached (`frozen_cache`), if the
model can be cut there (`layer_split`). If not, it runs whole in every step, and says so.

Shapes: U unique items, T tokens, D width of the encoder.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from recsys.config import ModalitySettings
from recsys.content.encoders.adapters import adapted_layers, add_lora, rewrites_base
from recsys.content.encoders.base import Encoder, normalize_pixels
from recsys.content.encoders.layer_split import LayerSplit, find_layers, find_split
from recsys.content.encoders.pooling import last_place, pool
from recsys.content.encoders.preparation import reads_whole_texts
from recsys.data.batch import ContentInput
from recsys.data.items.images import ImagePreparation

ITEMS_PER_GROUP = 32  # of like length, run through the trained layers together


class TransformerEncoder(Encoder):
    """A transformers text or vision model, run from the lowest layer that trains.

    Args:
        model: it gives `last_hidden_state` for `input_ids` or `pixel_values`.
        modality: `training`, `lora`, `pooling`, sizes and `activation_checkpointing` are read.
        where: the setting, for messages.
        projection: of the model's pooled output, for pooling `projected`; None: that output itself.
        preparation: how pixels are normalised.

    Raises:
        ValueError: the model cannot be run, LoRA finds not all of its layers and targets, or the
            inputs are larger than it can read.
    """

    def __init__(
        self,
        model: nn.Module,
        modality: ModalitySettings,
        where: str,
        projection: nn.Module | None = None,
        preparation: ImagePreparation | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config
        self.projection = projection
        self.pixels = preparation or ImagePreparation()
        self.is_text = modality.kind == "text"
        self.pooling = modality.pooling
        self.training_mode = modality.training
        self.max_length = modality.max_length if self.is_text else 1
        self.image_size = modality.image_size
        self._layers = find_layers(model)
        self.split: LayerSplit | None = None
        self._check_text_length(where)
        adapted = range(0)
        if modality.training == "lora":
            adapted = adapted_layers(modality.lora, len(self._layers), where)
        below = {"frozen": len(self._layers), "lora": adapted.start, "full": 0}
        self.first_trained = below[modality.training]
        self._try_out(where)
        self.caches = modality.training == "frozen" or self.split is not None
        if modality.training != "full":
            self.requires_grad_(False)
        if modality.training == "lora":
            add_lora(self._layers[adapted.start : adapted.stop], modality.lora, where)
            if rewrites_base(modality.lora):
                names = (name for name, _ in self.named_parameters())
                self.rewritten = {name for name in names if name.endswith(".base_layer.weight")}
        if modality.activation_checkpointing:
            for layer in self.trained_parts:
                layer.forward = functools.partial(  # type: ignore[method-assign]
                    checkpoint, layer.forward, use_reentrant=False
                )

    @property
    def trained_parts(self) -> list[nn.Module]:
        return self._layers[self.first_trained :]

    @property
    def frozen_layers(self) -> str:
        if self.training_mode == "lora":
            return f"embeddings and the lowest {self.first_trained}"
        return "all"

    def frozen_settings(self) -> Any:
        config = self.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        pixels = None if self.is_text else self.pixels
        return self.first_trained, self.training_mode, self.pooling, config, pixels

    def _check_text_length(self, where: str) -> None:
        """Longer texts than the position embeddings know would fail in training."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if not self.is_text or positions is None:
            return
        # RoBERTa numbers its positions from behind the padding id.
        embeddings = getattr(self.model, "embeddings", None)
        table = getattr(embeddings, "position_embeddings", None)
        first = getattr(table, "padding_idx", None)
        limit = positions - (0 if first is None else first + 1)
        if self.max_length > limit:
            raise ValueError(
                f"{where}.max_length is {self.max_length}; the encoder reads at most {limit} tokens"
            )
        if reads_whole_texts(self.config) and self.max_length != limit:
            raise ValueError(
                f"{where}.max_length is {self.max_length}; an encoder of SigLIP type reads texts "
                f"filled up to {limit} tokens, set {limit}"
            )

    def _try_out(self, where: str) -> None:
        """Runs the model once: its sizes, where it can be cut, which of its weights have an effect.

        Raises:
            ValueError: it cannot be run.
        """
        training = self.model.training
        self.model.eval()
        try:
            values, mask = self._sample()
            output = self._run(values, mask)
            tokens = self._finish(output, mask).values
        # What a model cannot do surfaces as whatever its code stumbles over.
        except Exception as error:
            raise ValueError(self._refusal(error, where)) from error
        self.output_dim = tokens.shape[-1]
        self.frozen_tokens = tokens.shape[1]
        if self.training_mode == "full":
            self._freeze_what_has_no_effect(tokens)
        if self.training_mode == "lora":
            self._try_split(values, mask, where)
        self.model.train(training)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Two texts or one image."""
        device = self.model.device
        if not self.is_text:
            size = self.image_size
            pixels = torch.arange(3 * size * size, device=device).view(1, 3, size, size)
            return pixels.to(torch.uint8), torch.ones(1, 1, dtype=torch.bool, device=device)
        length = self.max_length if reads_whole_texts(self.config) else min(self.max_length, 4)
        ids = torch.arange(2 * length, device=device).view(2, length)
        mask = torch.ones(2, length, dtype=torch.bool, device=device)
        if not reads_whole_texts(self.config) and length > 1:
            mask[0, -1] = False
        return self._ended(ids % self.config.vocab_size, mask), mask

    def _ended(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts with the sign of their end in the last place alone, where CLIP pools."""
        end = getattr(self.config, "eos_token_id", None)
        if not isinstance(end, int):
            return ids
        ids = ids.where(ids != end, int(end == 0))
        return ids.scatter(1, last_place(mask).unsqueeze(1), end)

    def _refusal(self, error: Exception, where: str) -> str:
        size, cause = getattr(self.config, "image_size", None), f"{type(error).__name__}: {error}"
        if not self.is_text and isinstance(size, int) and size != self.image_size:
            return f"{where}.image_size is {self.image_size}; the encoder wants {size} ({cause})"
        mend = "use a text or vision encoder that transformers has"
        if self.pooling == "projected":
            mend = "choose another pooling than projected"
        kind = "texts" if self.is_text else f"images of {self.image_size} pixels"
        model = type(self.model).__name__
        return f"{where}.encoder: {model} cannot be run on {kind} ({cause}); {mend}"

    def _freeze_what_has_no_effect(self, tokens: Tensor) -> None:
        """Weights that no loss reaches (mask tokens, norms of outputs that nobody reads)."""
        weights = [part for part in self.parameters() if part.requires_grad]
        gradients = torch.autograd.grad(tokens.sum(), weights, allow_unused=True)
        for part, gradient in zip(weights, gradients, strict=True):
            part.requires_grad_(gradient is not None)

    @torch.no_grad()
    def _try_split(self, values: Tensor, mask: Tensor, where: str) -> None:
        def tokens(output: Any) -> Tensor:
            finished = self._finish(output, mask)
            return finished.values.masked_fill(~finished.mask.unsqueeze(-1), 0)

        self.split, cause = find_split(
            self.model,
            self._layers[: self.first_trained],
            lambda: tokens(self._run(values, mask)),
            lambda hidden: tokens(self._run_above_cut(mask)),
        )
        if self.split is None:
            self.notes.append(
                f"{where}.encoder: {type(self.model).__name__} cannot be cut below its adapters "
                f"({cause}), so all of its layers run in every step and none is cached"
            )
            return
        hidden = self.split.below(lambda: self._run(values, mask))
        self.frozen_dim, self.frozen_tokens = hidden.shape[-1], hidden.shape[1]

    def train(self, mode: bool = True) -> TransformerEncoder:
        """Adapted layers alone: what is frozen gives one output per item, whatever it drops."""
        super().train(mode)
        if self.training_mode != "full":
            self.model.eval()
            for layer in self.trained_parts:
                layer.train(mode)
        return self

    def drop_frozen_layers(self) -> None:
        """Frees the weights whose outputs come from a cache; parameter names stay."""
        super().drop_frozen_layers()
        if self.split is not None:
            self.split.drop()
        else:
            for parameter in self.parameters():
                parameter.data = parameter.data.new_empty(0)

    def _run(self, values: Tensor, mask: Tensor) -> Any:
        """The model's own output."""
        if not self.is_text:
            return self.model(pixel_values=normalize_pixels(values, self.pixels))
        # An item without text attends to its padding, or softmax over nothing would give NaN;
        # its own mask still says that the result is no token.
        attended = (mask | ~mask.any(dim=1, keepdim=True)).long()
        # Without numbers, on meta, it cannot be looked at.
        return self.model(input_ids=values, attention_mask=None if mask.is_meta else attended)

    def _run_above_cut(self, mask: Tensor) -> Any:
        """The model on inputs of the right shape, as its embeddings hand on hidden states."""
        if not self.is_text:
            shape = (len(mask), 3, self.image_size, self.image_size)
            return self.model(pixel_values=torch.zeros((), device=mask.device).expand(shape))
        return self._run(self._ended(torch.zeros_like(mask, dtype=torch.long), mask), mask)

    def _finish(self, output: Any, mask: Tensor) -> ContentInput:
        """The model's output -> tokens for the fusion."""
        hidden = output.last_hidden_state
        if hidden.dim() == 4:  # the map of a convolutional network
            hidden = hidden.flatten(2).transpose(1, 2)
        if not self.is_text:
            mask = mask[:, :1].expand(-1, hidden.shape[1])
        if self.pooling != "projected":
            return pool(hidden, mask, self.pooling)
        if getattr(output, "pooler_output", None) is None:
            raise ValueError("it has no pooled output of its own")
        pooled = output.pooler_output.flatten(1)
        token = pooled if self.projection is None else self.projection(pooled)
        return ContentInput(token.unsqueeze(1), mask.any(dim=1, keepdim=True))

    def frozen(self, content: ContentInput) -> ContentInput:
        """All of a frozen model; of an adapted one what lies below the cut."""
        if self.training_mode == "frozen":
            return self._finish(self._run(content.values, content.mask), content.mask)
        if self.split is None:
            return content
        hidden = self.split.below(lambda: self._run(content.values, content.mask))
        return ContentInput(hidden, content.mask.expand(-1, hidden.shape[1]))

    def forward(self, content: ContentInput) -> ContentInput:
        if self.training_mode == "frozen":
            return content
        # On the meta device there are no lengths to look at.
        if self.is_text and self.pooling != "none" and not content.mask.is_meta:
            return self._by_length(content)
        return self._trained(content)

    def _trained(self, content: ContentInput) -> ContentInput:
        """What `frozen` leaves."""
        if self.split is None:
            return self._finish(self._run(content.values, content.mask), content.mask)
        hidden, mask = content.values, content.mask
        if not self.is_text:  # where no item of a batch has an image, its padding is one token
            hidden = pad(hidden, (0, 0, 0, self.frozen_tokens - hidden.shape[1]))
        return self._finish(self.split.above(hidden, lambda: self._run_above_cut(mask)), mask)

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
        values = torch.cat([part.values for part in parts])
        mask, back = torch.cat([part.mask for part in parts]), order.argsort()
        return ContentInput(values[back], mask[back])
