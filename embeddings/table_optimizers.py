"""Fused optimizers: each table is updated inside the backward pass, at its own learning rate.

All other trainable parameters belong to the dense optimizer. A table under the wrong optimizer
would train wrongly without an error, so a table without a fused optimizer is an error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.optim import RowWiseAdagrad

from embeddings.sharding import parameters_of
from embeddings.tables import TableConfig


def fuse_table_optimizers(module: nn.Module, tables: Sequence[TableConfig]) -> None:
    """Give every table of the unsharded ``module`` its optimizer in backward; call before planning.

    Raises:
        ValueError: a table is in the model or in the configuration only.

    Example::

        from embeddings import TableConfig, build_embedding_collection, fuse_table_optimizers

        tables = [TableConfig("item", 100, 4, ["item"], optimizer="adagrad")]
        collection = build_embedding_collection(tables)  # its tables are on meta
        fuse_table_optimizers(collection, tables)
    """
    configured = {table.name: table for table in tables}
    for name, parameter in parameters_of(module, tables).items():
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
    # Without a mode the fused kernel ignores the weight decay.
    arguments["weight_decay_mode"] = WeightDecayMode.L2
    return RowWiseAdagrad, arguments
