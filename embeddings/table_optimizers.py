"""Who updates which parameter, and how fast.

Tables are updated inside the backward pass by fused kernels, each table with its own optimizer
and learning rate; all other trainable parameters belong to one AdamW in named groups. Mixing the
two up trains silently wrong, so a table in the dense optimizer is an error, and
:func:`describe_optimizers` prints for every parameter who updates it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed.optim import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.optim import RowWiseAdagrad

from embeddings.sharding import table_parameters
from embeddings.tables import TableConfig


def fuse_table_optimizers(module: nn.Module, tables: Sequence[TableConfig]) -> None:
    """Give every table of the unsharded ``module`` its optimizer in backward; before planning.

    Raises:
        ValueError: a table is in the model or in the configuration only.
    """
    configured = {table.name: table for table in tables}
    parameters = dict(table_parameters(module))
    for name in sorted(parameters.keys() ^ configured.keys()):
        place = "the model" if name in parameters else "the configuration"
        raise ValueError(f"table '{name}' is only in {place}; configure every table once")
    for name, parameter in parameters.items():
        optimizer_class, arguments = _table_optimizer(configured[name])
        apply_optimizer_in_backward(optimizer_class, [parameter], arguments)


def _table_optimizer(table: TableConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if table.frozen:
        # requires_grad=False would not keep the fused kernel from updating it.
        return torch.optim.SGD, {"lr": 0.0}
    arguments: dict[str, Any] = {"lr": table.learning_rate}
    if table.optimizer == "sgd":
        return torch.optim.SGD, arguments
    arguments["eps"] = table.eps
    if table.optimizer == "adagrad":
        return torch.optim.Adagrad, arguments
    arguments["weight_decay"] = table.weight_decay
    if table.optimizer == "adam":
        return torch.optim.Adam, arguments
    # Without a mode the fused kernel takes the weight decay and ignores it.
    arguments["weight_decay_mode"] = WeightDecayMode.L2
    return RowWiseAdagrad, arguments
