"""Groups of dense parameters, each with its learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from recsys.config import Config

_NORMALIZATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class DenseGroup:
    """Parameters outside the tables that share a learning rate and a weight decay.

    Biases, normalisation layers and one-dimensional parameters get no weight decay.

    Example::

        from recsys.optimizer import DenseGroup

        [DenseGroup("content", ["content."], 1e-4), DenseGroup("rest", [""], weight_decay=0.01)]
    """

    name: str
    prefixes: list[str]  # of parameter names in the unwrapped model; [""] matches all
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None  # of Adam and AdamW; None: the optimizer's default


def dense_groups(config: Config) -> list[DenseGroup]:
    """Return the groups of a run: trained encoders, other content parameters, and the rest."""
    settings = config.optimizer
    decay = settings.weight_decay
    return [
        DenseGroup("encoders", ["content.encoders."], settings.encoder_learning_rate, decay),
        DenseGroup("content", ["content.", "losses."], settings.content_learning_rate, decay),
        DenseGroup("ranking", [""], settings.learning_rate, decay),
    ]


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that no fused optimizer updates, by unwrapped name.

    Raises:
        ValueError: a table is among them.
    """
    kinds = (ShardedModule, EmbeddingBagCollection, EmbeddingCollection)
    unwrapped = get_unwrapped_module(model)
    table_prefixes = tuple(
        f"{name}." if name else ""
        for name, module in unwrapped.named_modules()
        if isinstance(module, kinds)
    )
    result = {}
    for name, parameter in unwrapped.named_parameters():
        if hasattr(parameter, "_in_backward_optimizers") or not parameter.requires_grad:
            continue
        if name.startswith(table_prefixes):
            raise ValueError(
                f"table parameter '{name}' has no fused optimizer and would fall to the dense "
                "one; call fuse_table_optimizers before sharding, and shard with "
                "embeddings.sharders(), which never make a table data-parallel"
            )
        result[name] = parameter
    return result


def parameter_groups(
    model: nn.Module, parameters: dict[str, nn.Parameter], groups: Sequence[DenseGroup]
) -> list[dict[str, Any]]:
    """Return torch.optim's parameter groups, each with the names of its parameters as `names`.

    A parameter belongs to the first group with a matching prefix. A DenseGroup with weight decay
    becomes two parameter groups, with and without it.

    Raises:
        ValueError: a parameter fits no group.
    """
    undecayed = _undecayed_names(model)
    result = []
    remaining = dict(parameters)
    for group in groups:
        prefixes = tuple(group.prefixes)
        taken = [name for name in remaining if name.startswith(prefixes)]
        decayed = [name for name in taken if group.weight_decay > 0 and name not in undecayed]
        for names, weight_decay in [
            (decayed, group.weight_decay),
            ([name for name in taken if name not in decayed], 0.0),
        ]:
            if names:
                settings: dict[str, Any] = {"lr": group.learning_rate, "weight_decay": weight_decay}
                if group.betas is not None:
                    settings["betas"] = tuple(group.betas)
                params = [remaining[name] for name in names]
                result.append({"params": params, "names": names, "name": group.name, **settings})
        for name in taken:
            del remaining[name]
    if remaining:
        raise ValueError(
            f"parameter '{next(iter(remaining))}' ({len(remaining)} in all) fits no group of "
            f"{[group.name for group in groups]}; end with a group whose prefixes are ['']"
        )
    return result


def _undecayed_names(model: nn.Module) -> set[str]:
    """Return the names of parameters without weight decay."""
    names = set()
    for module_name, module in get_unwrapped_module(model).named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim <= 1 or name == "bias" or isinstance(module, _NORMALIZATIONS):
                names.add(f"{module_name}.{name}" if module_name else name)
    return names
