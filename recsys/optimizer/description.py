"""Text table of every parameter of a model with its optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.plan_text import align_columns
from embeddings.tables import TableConfig


def describe_optimizers(model: nn.Module, tables: Sequence[TableConfig], dense: Optimizer) -> str:
    """Return every parameter of the model with its optimizer and learning rate, as a text table.

    Tables are listed by name, dense parameters by group and weight decay, then the frozen ones;
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
        # A schedule may already have lowered "lr"; the configured rate is "initial_lr".
        rate, decay = f"{group.get('initial_lr', group['lr']):g}", f"{group['weight_decay']:g}"
        rows.append((group["name"], len(group["params"]), size, kind, rate, decay))
    if frozen := _frozen_parameters(model):
        size = sum(parameter.numel() for parameter in frozen)
        rows.append(("frozen", len(frozen), size, "none", "-", "-"))
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows), "", "", ""))
    return align_columns([header, *[(row[0], str(row[1]), str(row[2]), *row[3:]) for row in rows]])


def _frozen_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that no optimizer updates."""
    return [
        parameter
        for parameter in get_unwrapped_module(model).parameters()
        if not parameter.requires_grad and not hasattr(parameter, "_in_backward_optimizers")
    ]
