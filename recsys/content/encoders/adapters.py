"""Low-rank adapters (LoRA, arXiv 2106.09685) in some layers of an encoder, by peft.

A linear map `W x` becomes `W x + scale · B A x` with A [rank, in] and B [out, rank] trained and W
frozen; scale is alpha / rank, with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank). DoRA (arXiv
2402.09353) trains the norm of each row of the sum separately, as a magnitude vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from recsys.config import LoraSettings

ALL_LINEAR = "all-linear"
# These move a part of the base weights into the adapter, so that the base weights differ from those
# of the encoder's checkpoint.
REWRITING = ("pissa", "olora")


def adapted_layers(lora: LoraSettings, num_layers: int, where: str) -> range:
    """Return the indices of the layers that get adapters.

    Raises:
        ValueError: the model has no such layers.
    """
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
    """Add adapters to each of the layers.

    Raises:
        ValueError: a target matches no linear map, or peft rejects the settings.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, part in layers[0].named_modules() if isinstance(part, nn.Linear)]
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
        names = [name for name, part in layer.named_modules() if isinstance(part, nn.Linear)]
        try:
            settings = LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=names if ALL_LINEAR in lora.targets else lora.targets,
                use_dora=lora.use_dora,
                use_rslora=lora.use_rslora,
                init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]
            )
            inject_adapter_in_model(settings, layer)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{where}.lora: peft refuses {asdict(lora)}: {error}") from error


def rewrites_base(lora: LoraSettings) -> bool:
    """Return whether the initialisation of the adapters changes the base weights."""
    return str(lora.init_lora_weights).startswith(REWRITING)
