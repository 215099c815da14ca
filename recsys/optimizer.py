"""Optimizers of the dense parameters: AdamW in named groups, and its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import CombinedOptimizer, KeyedOptimizerWrapper

from embeddings.plan_text import align_columns
from embeddings.tables import TableConfig
from recsys.config import Config

_NORMALIZATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class DenseGroup:
    """Parameters outside the tables that share a learning rate and a weight decay.

    Biases, normalisation layers and one-dimensional parameters get no weight decay.
    """

    name: str
    prefixes: list[str]  # of parameter names in the unwrapped model; [""] takes all the rest
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


def build_dense_optimizer(
    model: nn.Module, groups: Sequence[DenseGroup]
) -> tuple[CombinedOptimizer, torch.optim.AdamW]:
    """One AdamW over everything trainable that is not a table, joined with the fused optimizers.

    Args:
        model: a DistributedModelParallel, or any module for training without sharding.
        groups: the first group with a matching prefix takes a parameter. Frozen parameters are
            left out.

    Returns:
        The optimizer to step and to checkpoint, and the AdamW inside it for learning-rate
        schedules. Each parameter group of the AdamW carries its DenseGroup's ``name``.

    Raises:
        ValueError: a table would be in the dense optimizer, a parameter fits no group, or there
            is nothing dense to train.
    """
    parameters = dense_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter outside its tables; unfreeze some")
    parameter_groups = _parameter_groups(model, parameters, groups)
    ordered = {name: parameters[name] for group in parameter_groups for name in group["names"]}
    for group in parameter_groups:
        del group["names"]
    # One kernel over all parameters: on CPU the default is a Python loop over small operations.
    adamw = torch.optim.AdamW(parameter_groups, fused=True)
    dense = KeyedOptimizerWrapper(ordered, lambda _: adamw)
    if isinstance(model, DistributedModelParallel):
        return CombinedOptimizer([model.fused_optimizer, dense]), adamw
    return CombinedOptimizer([dense]), adamw


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that no fused optimizer updates, by name in the unwrapped model.

    Raises:
        ValueError: a table is among them.
    """
    table_prefixes = _table_prefixes(model)
    result = {}
    for name, parameter in get_unwrapped_module(model).named_parameters():
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


def _table_prefixes(model: nn.Module) -> tuple[str, ...]:
    kinds = (ShardedModule, EmbeddingBagCollection, EmbeddingCollection)
    return tuple(
        f"{name}." if name else ""
        for name, module in get_unwrapped_module(model).named_modules()
        if isinstance(module, kinds)
    )


def _parameter_groups(
    model: nn.Module, parameters: dict[str, nn.Parameter], groups: Sequence[DenseGroup]
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: a DenseGroup with weight decay makes two, with and without."""
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
                result.append(
                    {
                        "params": [remaining[name] for name in names],
                        "names": names,
                        "name": group.name,
                        "lr": group.learning_rate,
                        "weight_decay": weight_decay,
                        "betas": tuple(group.betas),
                    }
                )
        for name in taken:
            del remaining[name]
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


def initialize_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of a fresh dense optimizer, so that a checkpoint can be loaded into it.

    torch.distributed.checkpoint fills only what the destination already has, and an optimizer
    has no moments before its first step. Weights stay as they are, and an optimizer that is not
    loaded afterwards behaves as a new one.
    """
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    gradients = []
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            assert parameter not in optimizer.state, "the optimizer has stepped already"
            gradients.append((parameter, parameter.grad))
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate
    for parameter, gradient in gradients:
        parameter.grad = gradient
        optimizer.state[parameter]["step"].zero_()


def describe_optimizers(
    model: nn.Module, tables: Sequence[TableConfig], dense: torch.optim.Optimizer
) -> str:
    """Every parameter of the model with its optimizer and learning rate, as a table to read.

    Tables stand there by name, dense parameters by group and weight decay, then the frozen ones;
    the last line is the sum, which is the model's size.
    """
    header = ("parameters", "tensors", "elements", "optimizer", "learning rate", "weight decay")
    rows: list[tuple[str, int, int, str, str, str]] = []
    for table in tables:
        size = table.num_embeddings * table.embedding_dim
        if table.frozen:
            rows.append((f"table {table.name}", 1, size, "none (frozen)", "-", "-"))
            continue
        rate, decay = f"{table.learning_rate:g}", f"{table.weight_decay:g}"
        rows.append((f"table {table.name}", 1, size, f"{table.optimizer} (fused)", rate, decay))
    kind = type(dense).__name__
    for group in dense.param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        # A schedule may already have lowered "lr"; the rate it was given is "initial_lr".
        rate, decay = f"{group.get('initial_lr', group['lr']):g}", f"{group['weight_decay']:g}"
        rows.append((group["name"], len(group["params"]), size, kind, rate, decay))
    frozen = _frozen_parameters(model)
    if frozen:
        size = sum(parameter.numel() for parameter in frozen)
        rows.append(("frozen", len(frozen), size, "none", "-", "-"))
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows), "", "", ""))
    return align_columns([header, *[(row[0], str(row[1]), str(row[2]), *row[3:]) for row in rows]])


def _frozen_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [
        parameter
        for parameter in get_unwrapped_module(model).parameters()
        if not parameter.requires_grad and not hasattr(parameter, "_in_backward_optimizers")
    ]


def dense_groups(config: Config) -> list[DenseGroup]:
    """AdamW's groups: what trains in the encoders, the rest of content, and everything else."""
    settings = config.optimizer
    decay = settings.weight_decay
    return [
        DenseGroup("encoders", ["content.encoders."], settings.encoder_learning_rate, decay),
        DenseGroup("content", ["content.", "losses."], settings.content_learning_rate, decay),
        DenseGroup("ranking", [""], settings.learning_rate, decay),
    ]


def warmup_schedule(adamw: AdamW, warmup_steps: int) -> LambdaLR:
    """Learning rates rise linearly over the first steps, then stay."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / max(warmup_steps, 1))

    return LambdaLR(adamw, share)
