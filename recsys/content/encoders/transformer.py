"""TransformerEncoder: any `transformers` text or vision model, frozen, with adapters or trained.

Adapters: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353). Side tuning: a small network over
the pooled hidden states of all layers (ladder side tuning, arXiv 2206.06522), as IISAN (arXiv
2404.02059) has it for recommenders, within one modality. The encoder stays frozen and its states
are cached, so that a step costs about what it does with frozen features.
Shapes: U unique items, T tokens, D width of the encoder, S states (of the embeddings and of each
layer), K width of a bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.base import Encoder, Pooling, pool
from recsys.content.encoders.identity import EncoderIdentity, weights_digest
from recsys.content.encoders.layer_split import LayerSplit, find_layers, find_split
from recsys.content.encoders.pretrained import PretrainedEncoder
from recsys.content.wrap import wrap
from recsys.data.items.images import ImagePreparation
from recsys.data.items.kind import ContentInput


def pooled_states(output: Any, mask: Tensor, pooling: Pooling) -> ContentInput:
    """Pool the states of all layers of a transformers model's output; values [U, S, D]."""
    states = getattr(output, "hidden_states", None)
    if not states or {state.shape for state in states} != {output.last_hidden_state.shape}:
        raise ValueError("side tuning needs the hidden states of all layers, of one width")
    # The last state is the model's output, which some models normalise after their layers.
    pooled = [pool(state, mask, pooling) for state in (*states[:-1], output.last_hidden_state)]
    values, masks = zip(*((state.values, state.mask) for state in pooled))
    return ContentInput(torch.cat(values, dim=1), torch.cat(masks, dim=1))


class SideNetwork(nn.Module):
    """k_0 = gelu(V_0 e_0), k_s = gelu(V_s e_s + A_s k_{s-1}); returns e_S + U k_S.

    e are the states, of which e_S is the output of the frozen encoder. U starts at zero, as the
    adapters of LoRA do, so that training begins with the frozen encoder.
    """

    def __init__(self, num_states: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, bottleneck) for _ in range(num_states))
        self.across = nn.ModuleList(
            nn.Linear(bottleneck, bottleneck, bias=False) for _ in range(num_states - 1)
        )
        self.up = nn.Linear(bottleneck, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, content: ContentInput) -> ContentInput:  # [U, S, D] -> [U, 1, D]
        states = content.values.float()
        # A batch in which no item has content is padded to one token alone.
        states = F.pad(states, (0, 0, 0, len(self.down) - states.shape[1]))
        ladder = F.gelu(self.down[0](states[:, 0]))  # [U, K]
        for index, across in enumerate(self.across, start=1):
            ladder = F.gelu(self.down[index](states[:, index]) + across(ladder))
        output = states[:, -1] + self.up(ladder)
        return ContentInput(output.unsqueeze(1), content.mask[:, :1])


ALL_LINEAR = "all-linear"


def adapted_layers(lora: LoraSettings, num_layers: int, where: str) -> range:
    """Return the indices of the layers with adapters; ValueError if there are no such layers."""
    if lora.layers is None:
        if not 1 <= lora.top_layers <= num_layers:
            raise ValueError(
                f"{where}.lora.top_layers is {lora.top_layers}; the encoder has {num_layers} "
                f"layers, choose 1 to {num_layers}"
            )
        return range(num_layers - lora.top_layers, num_layers)
    first, last = lora.layers
    if last >= num_layers:
        raise ValueError(
            f"{where}.lora.layers is {lora.layers}; the encoder has the layers 0 to "
            f"{num_layers - 1}"
        )
    return range(first, last + 1)


def add_lora(layers: Sequence[nn.Module], lora: LoraSettings, where: str) -> None:
    """Add adapters to each layer; ValueError for a target without linear map, or from peft."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)]
    if lora.rank < 1 or not lora.targets:
        raise ValueError(
            f"{where}.lora: rank {lora.rank} and targets {lora.targets}; rank must be at least "
            f"1 and targets name some of {linear}"
        )
    for target in lora.targets:
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(
                f"{where}.lora.targets: '{target}' fits no linear layer of "
                f"{type(layers[0]).__name__}; choose from {linear}, or {ALL_LINEAR}"
            )
    # Layer by layer: peft's selection of layers by index depends on the name of the model's stack.
    for layer in layers:
        names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        try:
            settings = LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=names if ALL_LINEAR in lora.targets else lora.targets,
                use_dora=lora.use_dora,
            )
            inject_adapter_in_model(settings, layer)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{where}.lora: peft refuses {asdict(lora)}: {error}") from error


class Recomputed(nn.Module):
    """Wrapper of a layer whose activations are recomputed in the backward instead of kept."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return checkpoint(super().forward, *arguments, use_reentrant=False, **keywords)


class TransformerEncoder(Encoder):
    """A transformers model; `TextTransformer` and `ImageTransformer` define inputs and tokens.

    `projection` maps the model's pooled output, for pooling `projected`. Texts have no `pixels`. A
    model that does not fit its settings is a ValueError.
    """

    inputs: str  # what the model reads, for messages
    tower_name: str  # the part of a dual encoder that reads this input
    projection_name: str  # the map of its pooled output to the space of both parts

    def __init__(
        self,
        model: nn.Module,
        modality: ModalitySettings,
        where: str,
        projection: nn.Module | None = None,
        pixels: ImagePreparation | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config
        self.projection = projection
        self.pixels, self.pooling, self.training_mode = pixels, modality.pooling, modality.training
        self._read_settings(modality, where)
        self._layers = find_layers(model)
        self.split: LayerSplit | None = None
        adapted, num_layers = range(0), len(self._layers)
        if modality.training == "lora":
            adapted = adapted_layers(modality.lora, num_layers, where)
        first = {"lora": adapted.start, "full": 0}
        self.first_trained = first.get(modality.training, num_layers)
        self.side: SideNetwork | None = None
        self.is_frozen = modality.training in ("frozen", "side")
        if modality.training == "side":
            model.config.output_hidden_states = True  # type: ignore[union-attr]
        self._probe(where)
        self.caches = self.is_frozen or self.split is not None
        if modality.training != "full":
            self.requires_grad_(False)
        if modality.training == "side":
            self.side = SideNetwork(self.frozen_tokens, self.output_dim, modality.side_width)
        if self.side is not None or (self.is_frozen and modality.pooling == "none"):
            self.frozen_dtype = torch.float16
        if modality.training == "lora":
            add_lora(self._layers[adapted.start : adapted.stop], modality.lora, where)
        if modality.activation_checkpointing:
            for layer in self.trained_modules:
                wrap(layer, Recomputed)

    @classmethod
    def load(
        cls,
        pretrained: PretrainedEncoder,
        modality: ModalitySettings,
        where: str,
        pixels: ImagePreparation | None = None,
    ) -> Self:
        """Return the encoder with its weights and, unless these are on meta, its identity.

        With pooling `projected` both towers of CLIP or SigLIP give vectors of one space.
        """
        is_projected = modality.pooling == "projected"
        tower, projection = pretrained.load_model(is_projected), None
        if isinstance(inner := getattr(tower, cls.tower_name, None), nn.Module):
            projection, tower = getattr(tower, cls.projection_name, None), inner
        identity = None
        if torch.get_default_device().type != "meta":
            # Computed before adapters are added to its weights.
            modules = [module for module in (tower, projection) if isinstance(module, nn.Module)]
            weights = weights_digest(nn.ModuleList(modules))
            identity = EncoderIdentity(pretrained.name, pretrained.commit, weights)
        encoder = cls(tower, modality, where, projection if is_projected else None, pixels)
        encoder.identity = identity
        if pretrained.is_on_hub and pretrained.revision is None:
            encoder.notes.append(
                f"{where}.encoder: '{pretrained.name}' is whatever its repository holds at the "
                f"time; pin it by `revision: {pretrained.commit or 'COMMIT'}`"
            )
        return encoder

    @property
    def trained_modules(self) -> list[nn.Module]:
        """Layers from the lowest trained or adapted one to the top; or the side network."""
        return [self.side] if self.side is not None else self._layers[self.first_trained :]

    def frozen_settings(self) -> Any:
        config = self.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        return self.first_trained, self.training_mode, self.pooling, config, self.pixels

    def _probe(self, where: str) -> None:
        training = self.model.training
        self.model.eval()
        try:
            values, mask = self._sample()
            output = self._run(values, mask)
            tokens = self._finish(output, mask).values
        # A model that cannot read the sample may raise any exception.
        except Exception as error:
            raise ValueError(self._refusal(error, where)) from error
        self.output_dim = tokens.shape[-1]
        self.frozen_tokens = tokens.shape[1]
        if self.training_mode == "full":
            weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(tokens.sum(), weights, allow_unused=True)
            for parameter, gradient in zip(weights, gradients, strict=True):
                parameter.requires_grad_(gradient is not None)  # frozen if it has no effect
        if self.training_mode == "lora":
            self._try_split(values, mask, where)
        self.model.train(training)

    def _refusal(self, error: Exception, where: str) -> str:
        fix = "use a text or vision encoder that transformers has"
        if self.pooling == "projected":
            fix = "choose another pooling than projected"
        model, cause = type(self.model).__name__, f"{type(error).__name__}: {error}"
        return f"{where}.encoder: {model} cannot be run on {self.inputs} ({cause}); {fix}"

    @torch.no_grad()
    def _try_split(self, values: Tensor, mask: Tensor, where: str) -> None:  # values: see `_run`
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
        hidden = self.split.run_below(lambda: self._run(values, mask))
        self.frozen_dim, self.frozen_tokens = hidden.shape[-1], hidden.shape[1]

    def train(self, mode: bool = True) -> TransformerEncoder:
        super().train(mode)
        if self.training_mode != "full":
            self.model.eval()
            for layer in self.trained_modules:
                layer.train(mode)
        return self

    def drop_frozen_layers(self) -> None:
        super().drop_frozen_layers()
        if self.split is not None:
            self.split.drop()
        else:
            for parameter in self.parameters():
                if not parameter.requires_grad:  # of the side network
                    parameter.data = parameter.data.new_empty(0)

    def _finish(self, output: Any, mask: Tensor) -> ContentInput:  # mask [U, T]
        hidden = output.last_hidden_state
        if hidden.dim() == 4:  # the feature map of a convolutional network
            hidden = hidden.flatten(2).transpose(1, 2)
        mask = self._token_mask(mask, hidden.shape[1])
        if self.training_mode == "side":
            return pooled_states(output, mask, self.pooling)
        if self.pooling != "projected":
            return pool(hidden, mask, self.pooling)
        if getattr(output, "pooler_output", None) is None:
            raise ValueError("it has no pooled output of its own")
        pooled = output.pooler_output.flatten(1)
        token = pooled if self.projection is None else self.projection(pooled)
        return ContentInput(token.unsqueeze(1), mask.any(dim=1, keepdim=True))

    def frozen(self, content: ContentInput) -> ContentInput:
        if self.is_frozen:
            return self._finish(self._run(content.values, content.mask), content.mask)
        if self.split is None:
            return content
        hidden = self.split.run_below(lambda: self._run(content.values, content.mask))
        return ContentInput(hidden, content.mask.expand(-1, hidden.shape[1]))

    def forward(self, content: ContentInput) -> ContentInput:  # tokens [U, T or 1, D]
        if self.side is not None:
            return self.side(content)
        return content if self.is_frozen else self._trained(content)

    def _trained(self, content: ContentInput) -> ContentInput:
        if self.split is None:
            return self._finish(self._run(content.values, content.mask), content.mask)
        hidden, mask = self._all_tokens(content.values), content.mask
        return self._finish(self.split.run_above(hidden, lambda: self._run_above_cut(mask)), mask)

    def _read_settings(self, modality: ModalitySettings, where: str) -> None:
        """Read and check the settings of texts or images alone."""

    def _sample(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _run(self, values: Tensor, mask: Tensor) -> Any:  # mask [U, T]
        raise NotImplementedError

    def _run_above_cut(self, mask: Tensor) -> Any:  # [U, T]
        """Run the model on dummy inputs; its embeddings return the given hidden states instead."""
        raise NotImplementedError

    def _token_mask(self, mask: Tensor, length: int) -> Tensor:  # [U, length]
        return mask

    def _all_tokens(self, hidden: Tensor) -> Tensor:  # [U, T, D]
        return hidden
