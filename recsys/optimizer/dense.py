"""Optimizer of the dense parameters (one of torch.optim, or a user's class), its groups and state.

Checkpoints store any optimizer's state as named tensors; a Python number gets a marked name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import CombinedOptimizer, KeyedOptimizerWrapper

from embeddings.plan_text import align_columns
from embeddings.tables import TableConfig
from recsys.config import OptimizerSettings
from recsys.config.named_parts import make_part

_NORMALIZATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class DenseGroup:
    """Parameters outside the tables that share a learning rate and a weight decay.

    Biases, normalisation layers and one-dimensional parameters get no weight decay.
    """

    name: str
    prefixes: list[str]  # of parameter names in the unwrapped model; [""] matches all
    learning_rate: float = 1e-3
    weight_decay: float = 0.0


def dense_groups(settings: OptimizerSettings) -> list[DenseGroup]:
    """Return the groups of a run: trained encoders, other content parameters, and the rest."""
    decay = settings.weight_decay
    return [
        DenseGroup("encoders", ["content.encoders."], settings.encoder_learning_rate, decay),
        DenseGroup("content", ["content.", "losses."], settings.content_learning_rate, decay),
        DenseGroup("ranking", [""], settings.learning_rate, decay),
    ]


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that no fused optimizer updates, by unwrapped name."""
    table_modules = (ShardedModule, EmbeddingBagCollection, EmbeddingCollection)
    unwrapped = get_unwrapped_module(model)
    table_prefixes = tuple(
        f"{name}." if name else ""
        for name, module in unwrapped.named_modules()
        if isinstance(module, table_modules)
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
    """Return torch.optim's parameter groups with `names`; the first matching prefix decides."""
    exempt, remaining, result = _undecayed_names(model), dict(parameters), []
    for group in groups:
        matching = [name for name in remaining if name.startswith(tuple(group.prefixes))]
        decayed = [name for name in matching if group.weight_decay > 0 and name not in exempt]
        undecayed = [name for name in matching if name not in decayed]
        for names, weight_decay in ((decayed, group.weight_decay), (undecayed, 0.0)):
            if names:
                settings: dict[str, Any] = {"lr": group.learning_rate, "weight_decay": weight_decay}
                params = [remaining.pop(name) for name in names]
                result.append({"params": params, "names": names, "name": group.name, **settings})
    if remaining:
        raise ValueError(
            f"parameter '{next(iter(remaining))}' ({len(remaining)} in all) fits no group of "
            f"{[group.name for group in groups]}; end with a group whose prefixes are ['']"
        )
    return result


def _undecayed_names(model: nn.Module) -> set[str]:
    names = set()
    for module_name, module in get_unwrapped_module(model).named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim <= 1 or name == "bias" or isinstance(module, _NORMALIZATIONS):
                names.add(f"{module_name}.{name}" if module_name else name)
    return names


OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "adafactor": "torch.optim:Adafactor",
}
# One kernel over all parameters: on CPU the default is a Python loop over small operations.
_FUSED = ("adamw", "adam", "sgd")


def build_dense_optimizer(
    model: nn.Module, groups: Sequence[DenseGroup], settings: OptimizerSettings | None = None
) -> tuple[CombinedOptimizer, Optimizer]:
    """Build the optimizer of all dense parameters, and join it with the fused ones of tables.

    A parameter belongs to the first group with a matching prefix. The default is AdamW. Returns the
    optimizer to step, and the dense one inside it for schedules and checkpoints.

    Example::

        from torch import nn
        from recsys.optimizer import DenseGroup, build_dense_optimizer

        optimizer, adamw = build_dense_optimizer(nn.Linear(2, 1), [DenseGroup("all", [""])])
        optimizer.step()  # with tables in the model, their fused optimizers are part of it
    """
    settings = settings or OptimizerSettings()
    parameters = dense_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter outside its tables; unfreeze some")
    optimizer_groups = parameter_groups(model, parameters, groups)
    ordered = {name: parameters[name] for group in optimizer_groups for name in group.pop("names")}
    dense = _make(settings, optimizer_groups)
    keyed = KeyedOptimizerWrapper(ordered, lambda _: dense)
    fused = [model.fused_optimizer] if isinstance(model, DistributedModelParallel) else []
    return CombinedOptimizer([*fused, keyed]), dense


def _make(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> Optimizer:
    for name in ("lr", "weight_decay"):
        if name in settings.options:
            raise ValueError(
                f"optimizer.options.{name}: each group of parameters has its own; set "
                "optimizer.learning_rate, content_learning_rate, encoder_learning_rate and "
                "weight_decay instead"
            )
    options = {"fused": True, **settings.options} if settings.name in _FUSED else settings.options
    return make_part("optimizer.name", settings.name, OPTIMIZERS, Optimizer, groups, **options)


def count_state(settings: OptimizerSettings, sizes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Count the elements that the optimizer and the moving average keep, by parameter."""
    unfused = replace(settings, options={**settings.options, "fused": False})
    settings = unfused if settings.name in _FUSED else settings
    try:
        state = _state_after_a_step(settings, sizes, "meta")
    except (RuntimeError, NotImplementedError):
        state = _state_after_a_step(settings, sizes, "cpu")
    average = settings.ema_decay is not None
    return {name: count + average * sizes[name].numel() for name, count in state.items()}


def _state_after_a_step(
    settings: OptimizerSettings, sizes: Mapping[str, torch.Size], device: str
) -> dict[str, int]:
    parameters = {name: nn.Parameter(torch.zeros(s, device=device)) for name, s in sizes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = _make(settings, [{"params": list(parameters.values()), "lr": 1e-3}])
    optimizer.step()
    return {
        name: sum(
            value.numel()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.dim()
        )
        for name, parameter in parameters.items()
    }


def gradient_norm(optimizer: Optimizer) -> Tensor:  # []
    """Return the norm of the gradients of all parameters together."""
    parameters = _parameters(optimizer)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def describe_optimizers(model: nn.Module, tables: Sequence[TableConfig], dense: Optimizer) -> str:
    """Return every parameter of the model with its optimizer and learning rate, as a text table."""
    header = ("parameters", "tensors", "elements", "optimizer", "learning rate", "weight decay")
    rows: list[tuple[str, int, int, str, str, str]] = []
    for table in tables:
        size = table.num_embeddings * table.embedding_dim
        kind, rate, decay = "none (frozen)", "-", "-"
        if not table.frozen:
            kind = f"{table.optimizer} (fused)"
            rate, decay = f"{table.learning_rate:g}", f"{table.weight_decay:g}"
        rows.append((f"table {table.name}", 1, size, kind, rate, decay))
    kind = type(dense).__name__
    for group in dense.param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        # A schedule may already have lowered "lr"; the configured rate is "initial_lr".
        rate, decay = f"{group.get('initial_lr', group['lr']):g}", f"{group['weight_decay']:g}"
        rows.append((group["name"], len(group["params"]), size, kind, rate, decay))
    frozen = [
        parameter
        for parameter in get_unwrapped_module(model).parameters()
        if not parameter.requires_grad and not hasattr(parameter, "_in_backward_optimizers")
    ]
    if frozen:
        size = sum(parameter.numel() for parameter in frozen)
        rows.append(("frozen", len(frozen), size, "none", "-", "-"))
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows), "", "", ""))
    return align_columns([header, *[(row[0], str(row[1]), str(row[2]), *row[3:]) for row in rows]])


# How Python numbers are stored: suffix of the name, type, type of the tensor.
_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "#bool": (bool, torch.bool),
    "#int": (int, torch.int64),
    "#float": (float, torch.float64),
}


def state_tensors(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Return the state of each parameter as `PARAMETER.KEY`; tensors share their memory."""
    state = {}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD without momentum
                continue
            name = f"{names[parameter]}.{key}"
            suffix = next((m for m, (kind, _) in _NUMBERS.items() if type(value) is kind), None)
            if isinstance(value, Tensor):
                state[name] = value
            elif suffix is None:
                raise ValueError(
                    f"optimizer {type(optimizer).__name__} keeps a {type(value).__name__} as "
                    f"'{key}' of parameter '{names[parameter]}'; a checkpoint holds tensors and "
                    "numbers"
                )
            else:
                state[name + suffix] = torch.tensor(value, dtype=_NUMBERS[suffix][1])
    return state


def make_room(
    optimizer: Optimizer,
    names: Mapping[nn.Parameter, str],
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> dict[str, Tensor]:
    """Replace an optimizer's state by uninitialised tensors of a checkpoint's names and sizes."""
    state = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[parameter]}."
            optimizer.state.pop(parameter, None)
            for name, (size, dtype) in stored.items():
                key = name.removeprefix(prefix)
                if key == name or "." in key:
                    continue
                state[name] = torch.empty(size, dtype=dtype, device=_device(group, parameter, key))
                optimizer.state[parameter][key] = state[name]
    return state


def restore_numbers(optimizer: Optimizer) -> None:
    """Turn the marked tensors into Python numbers after a load."""
    for parameter in _parameters(optimizer):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for suffix, (number_type, _) in _NUMBERS.items():
            for key in [key for key in state if key.endswith(suffix)]:
                state[key.removesuffix(suffix)] = number_type(state.pop(key).item())


def _device(group: dict[str, Any], parameter: nn.Parameter, key: str) -> torch.device:
    """Return the device of an entry of the state: torch.optim may keep the step on the host."""
    is_on_device = group.get("fused") or group.get("capturable")
    on_host = key.endswith(tuple(_NUMBERS)) or (key == "step" and not is_on_device)
    return torch.device("cpu") if on_host else parameter.device


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
