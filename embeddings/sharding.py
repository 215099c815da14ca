"""Plan which rank holds each shard of each table, and give each table its optimizer.

With C copies of the tables on W ranks, the W / C ranks of a copy exchange lookups. The copies are
averaged every few steps (TorchRec's 2D parallelism).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad

from embeddings.hardware import Hardware, find_hardware
from embeddings.table_sharders import sharders
from embeddings.tables import Kernel, TableConfig, check_tables

# Minimal width of column shards under sharding `auto`, as every column shard looks up all ids.
MIN_COLUMNS = 32

KERNELS: dict[Kernel, EmbeddingComputeKernel] = {
    "fused": EmbeddingComputeKernel.FUSED,
    "uvm": EmbeddingComputeKernel.FUSED_UVM,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING,
}


def constraints(table: TableConfig, world_size: int, prefetch: bool) -> ParameterConstraints:
    """Return the planner's constraints of one table, for the ranks that share a copy of it."""
    cache, is_auto = None, table.sharding == "auto"
    sharding_types = None if is_auto else [table.sharding]
    if is_auto and world_size == 1:
        sharding_types = [ShardingType.TABLE_WISE.value]
    elif is_auto and table.kernel != "fused":
        # The planner minimises lookup time alone, so it would put all such tables on one host.
        sharding_types = [ShardingType.ROW_WISE.value]
    if table.kernel == "uvm_caching":
        cache = CacheParams(load_factor=table.cache_load_factor, prefetch_pipeline=prefetch)
    # Column shards have equal widths; there are as many as possible, up to one per rank.
    dim, min_width = table.embedding_dim, MIN_COLUMNS if is_auto else 1
    widths = (dim // shards for shards in range(world_size, 1, -1) if dim % (4 * shards) == 0)
    width = next((width for width in widths if width >= min_width), dim)
    return ParameterConstraints(
        sharding_types=sharding_types,
        compute_kernels=[KERNELS[table.kernel].value],
        cache_params=cache,
        min_partition=width,
        # At least 1: with an estimated load of 0 the planner would put the table anywhere.
        pooling_factors=[max(table.ids_per_row.get(name, 1.0), 1.0) for name in table.features],
    )


def check_kernels(table: TableConfig, device: torch.device) -> None:
    """Raise a ValueError if the kernel of a table needs a GPU, and `device` is a CPU."""
    if device.type != "cpu":
        return
    if table.kernel != "fused":
        raise ValueError(
            f"table '{table.name}': kernel '{table.kernel}' needs CUDA, as a CPU has no memory "
            "apart from the host's; set it to 'fused'"
        )
    if table.optimizer == "adam" and not table.frozen:
        raise ValueError(
            f"table '{table.name}': the fused kernel of optimizer 'adam' needs CUDA; choose "
            "'rowwise_adagrad', 'adagrad' or 'sgd' on CPU"
        )
    if table.weight_decay > 0 and not table.frozen:
        raise ValueError(
            f"table '{table.name}': weight_decay {table.weight_decay} needs CUDA, the fused "
            "kernels on CPU ignore it; set it to 0"
        )


def machine_topology(
    world_size: int,
    local_world_size: int,
    device: torch.device,
    *,
    device_memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
    hardware: Hardware | None = None,
) -> Topology:
    """Return the planner's topology of machines that all equal this one."""
    hardware = hardware or Hardware()
    if host_memory_bytes is None:
        host_memory_bytes = free_host_memory() // local_world_size
    if device_memory_bytes is None and device.type == "cuda":
        device_memory_bytes = torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        # The planner's storage reservation reduces device memory only, not host memory.
        host_memory_bytes = int(host_memory_bytes * (1.0 - hardware.reserved_share))
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=world_size, local_world_size=local_world_size),
        hardware_config=hardware.config(device_memory_bytes, host_memory_bytes),
        kernel_config=KernelConfig(device.type, use_hardware_based_bandwidth=True),
    )


def free_host_memory() -> int:
    """Return the bytes that can still be allocated, at most the control group's limit."""
    available = int(psutil.virtual_memory().available)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", name)
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            available = min(available, int(limit))
    return available


def plan_sharding(
    module: nn.Module,
    tables: Sequence[TableConfig],
    process_group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    topology: Topology | None = None,
    module_sharders: list[ModuleSharder[nn.Module]] | None = None,
    prefetch: bool = False,
    copies: int = 1,
    hardware: Hardware | None = None,
) -> ShardingPlan:
    """Plan on rank 0 how ``module``'s tables are sharded. A collective: all ranks get the plan.

    `module` has its collections on meta, after `fuse_table_optimizers`. `batch_size` is rows per
    rank and step. The plan covers the ranks that share one of the `copies`. `topology` describes
    this machine by default; figures of `hardware` replace those known by the GPU's name. Without a
    process group, `topology` may be of any cluster. If no plan fits, all ranks raise a ValueError.

    Example::

        from embeddings import TableConfig, build_embedding_collection
        from embeddings import fuse_table_optimizers, plan_sharding

        tables = [TableConfig("item", 100, 4, ["item"])]
        model = build_embedding_collection(tables)
        fuse_table_optimizers(model, tables)
        plan = plan_sharding(model, tables)  # for DistributedModelParallel, with sharders()
    """
    group = process_group or (dist.group.WORLD if dist.is_initialized() else None)
    outcome: list[Any] = [None, None]  # the plan, or the reason of the failure
    cause: Exception | None = None
    if group is None or dist.get_rank(group) == 0:
        try:
            _check_module(module, tables, torch.device(device))
            resources = hardware or Hardware()
            topology = topology or _this_topology(group, torch.device(device), copies, resources)
            num_ranks = topology.world_size
            if group is not None and dist.get_world_size(group) // copies != num_ranks:
                raise ValueError(
                    f"the topology has {num_ranks} ranks and the process group "
                    f"{dist.get_world_size(group) // copies} per copy of the tables; make them "
                    "equal"
                )
            planner = EmbeddingShardingPlanner(
                topology=topology,
                batch_size=batch_size,
                storage_reservation=FixedPercentageStorageReservation(resources.reserved_share),
                constraints={t.name: constraints(t, num_ranks, prefetch) for t in tables},
                stats=NoopEmbeddingStats(),
                debug=False,
            )
            outcome[0] = planner.plan(module, module_sharders or sharders())
        except Exception as error:  # any exception, because the other ranks wait for the outcome
            cause, outcome[1] = error, _reason(error, tables)
    if group is not None:
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if outcome[1] is not None:
        raise ValueError(outcome[1]) from cause
    return cast(ShardingPlan, outcome[0])


def _this_topology(
    group: dist.ProcessGroup | None, device: torch.device, copies: int, hardware: Hardware
) -> Topology:
    world_size = 1 if group is None else dist.get_world_size(group)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cuda":
        hardware = hardware.or_else(find_hardware(torch.cuda.get_device_name(device)))
    return machine_topology(
        world_size // copies,
        max(local_world_size // copies, 1),
        device,
        host_memory_bytes=free_host_memory() // local_world_size,
        hardware=hardware,
    )


def _check_module(module: nn.Module, tables: Sequence[TableConfig], device: torch.device) -> None:
    check_tables(tables)
    parameters = find_parameters(module, tables)
    for table in tables:
        if not hasattr(parameters[table.name], "_optimizer_classes"):
            raise ValueError(
                f"table '{table.name}' has no fused optimizer and would train with a default; "
                "call fuse_table_optimizers before plan_sharding"
            )
        check_kernels(table, device)


def table_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each table's name and parameter in the collections of an unsharded ``module``."""
    for child in module.modules():
        if isinstance(child, EmbeddingBagCollection):
            holders = child.embedding_bags
        elif isinstance(child, EmbeddingCollection):
            holders = child.embeddings
        else:
            continue
        for name, holder in holders.items():
            yield name, cast(nn.Parameter, holder.weight)


def find_parameters(module: nn.Module, tables: Sequence[TableConfig]) -> dict[str, nn.Parameter]:
    """Return each table's parameter; raise a ValueError if model and `tables` differ in tables."""
    parameters = dict(table_parameters(module))
    for name in sorted(parameters.keys() ^ {table.name for table in tables}):
        owner = "the model" if name in parameters else "the configuration"
        raise ValueError(f"table '{name}' is only in {owner}; configure every table once")
    return parameters


def _reason(error: Exception, tables: Sequence[TableConfig]) -> str:
    if not isinstance(error, PlannerError):
        return str(error) if type(error) is ValueError else f"planning failed: {error!r}"
    sizes = sorted(tables, key=lambda table: -table.num_embeddings * table.embedding_dim)[:3]
    largest = ", ".join(f"'{t.name}' {t.megabytes:.1f} MB ({t.sharding})" for t in sizes)
    return (
        f"the tables do not fit; the largest: {largest}. Add ranks or memory, choose sharding "
        "'row_wise' or 'auto' for the large tables, or lower num_embeddings or embedding_dim. "
        f"The planner says: {error}"
    )


def fuse_table_optimizers(module: nn.Module, tables: Sequence[TableConfig]) -> None:
    """Give every table of the unsharded ``module`` its optimizer in backward; call before planning.

    Raises a ValueError for a table that only the model or only the configuration has.

    Example::

        from embeddings import TableConfig, build_embedding_collection, fuse_table_optimizers

        tables = [TableConfig("item", 100, 4, ["item"], optimizer="adagrad")]
        fuse_table_optimizers(build_embedding_collection(tables), tables)
    """
    configured = {table.name: table for table in tables}
    for name, parameter in find_parameters(module, tables).items():
        optimizer_class, arguments = _table_optimizer(configured[name])
        _step_in_backward(parameter, optimizer_class, arguments)


def _step_in_backward(
    parameter: nn.Parameter, cls: type[torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    """Give a table an optimizer that steps in backward, and tell TorchRec its class.

    It replaces torch's `_apply_optimizer_in_backward`, whose import compiles optimizers for 0.5 s.
    """
    optimizer = cls([parameter], **arguments)

    def step(parameter: torch.Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(step)
    attributes: Any = parameter
    attributes._in_backward_optimizers = [optimizer]
    attributes._optimizer_classes = [cls]  # sharded tables read these classes and arguments
    attributes._optimizer_kwargs = [arguments]


def _table_optimizer(table: TableConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if table.frozen:
        # The fused kernel would update a weight even with requires_grad=False.
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
    # The fused kernel ignores weight decay unless a mode is set.
    arguments["weight_decay_mode"] = WeightDecayMode.L2
    return RowWiseAdagrad, arguments


class CopiesMean:
    """Averages the copies of all tables every few steps. Each method is a collective."""

    def __init__(self, model: DMPCollection, interval: int) -> None:
        self.model, self.interval, self._steps = model, interval, 0

    def step(self) -> None:
        """Count a training step, and average the copies if `interval` steps have passed."""
        self._steps += 1
        if self._steps >= self.interval:
            self.average()

    def average(self) -> None:
        """Average the copies if there was a step since the last average. A collective."""
        if self._steps:
            self.model.sync()
            self._steps = 0
