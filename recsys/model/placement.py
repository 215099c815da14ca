"""Checks of where the ID tables lie: kernels, prefetching and copies that need GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, replace

from embeddings.hardware import Hardware
from recsys.config import Config, EmbeddingSettings, HardwareSettings, ParallelSettings
from recsys.data.schema import Schema


def check_placement(
    settings: EmbeddingSettings,
    schema: Schema,
    device: str,
    world_size: int,
    ranks_per_node: int,
) -> None:
    """Refuse settings of kernels, prefetching and copies that do not fit the ranks of a job."""
    problems = [*_kernel_problems(settings, schema, device), *_prefetch_problems(settings, device)]
    if settings.parallel.copies > 1:
        problems += _copies_problems(settings, device, world_size, ranks_per_node)
    if problems:
        raise ValueError(f"embedding.{problems[0]}")


def placed_for_scoring(config: Config, device: str) -> Config:
    """Return the configuration without settings that only training or only a GPU needs."""
    tables = config.embedding.tables
    if device == "cpu":
        tables = {
            name: replace(table, kernel="fused", cache_load_factor=None)
            for name, table in tables.items()
        }
    embedding = replace(
        config.embedding, tables=tables, prefetch=False, parallel=ParallelSettings()
    )
    return replace(config, embedding=embedding)


def planner_hardware(settings: HardwareSettings) -> Hardware:
    """Return the figures that settings give to the planner."""
    return Hardware(*astuple(settings))


def _kernel_problems(settings: EmbeddingSettings, schema: Schema, device: str) -> Iterator[str]:
    for name, table in settings.tables.items():
        where, kernel = f"tables.{name}", table.kernel
        if table.cache_load_factor is not None and kernel != "uvm_caching":
            yield (
                f"{where}.cache_load_factor is {table.cache_load_factor:g}, but kernel {kernel} "
                "has no cache; set kernel to uvm_caching, or leave it out"
            )
        if kernel != "fused" and device == "cpu":
            yield (
                f"{where}.kernel is {kernel}, but the device is cpu, which has no memory apart "
                "from the host's; set it to fused, or device to cuda on a machine with GPUs"
            )
        vocabulary = schema.vocabulary_of(name)
        if kernel == "uvm_caching" and vocabulary is not None and vocabulary.kind == "bounded":
            yield (
                f"{where}.kernel is uvm_caching, but a vocabulary of kind bounded resets rows "
                "within training, behind the cache; set it to uvm or fused, or choose kind exact"
            )


def _prefetch_problems(settings: EmbeddingSettings, device: str) -> Iterator[str]:
    if settings.prefetch and device == "cpu":
        yield (
            "prefetch is true, but the device is cpu; set it to false, or device to cuda on a "
            "machine with GPUs"
        )
    if settings.prefetch and all(t.kernel != "uvm_caching" for t in settings.tables.values()):
        yield (
            "prefetch is true, but no table has a cache to fetch into; set "
            "embedding.tables.X.kernel to uvm_caching, or it to false"
        )


def _copies_problems(
    settings: EmbeddingSettings, device: str, world_size: int, ranks_per_node: int
) -> Iterator[str]:
    copies = settings.parallel.copies
    where = f"parallel.copies is {copies}, but"
    if device == "cpu":
        yield f"{where} the device is cpu; set it to 1, or device to cuda on machines with GPUs"
    if ranks_per_node % copies:
        yield (
            f"{where} a node has {ranks_per_node} ranks, which it does not divide; set it to 1 or "
            "another divisor"
        )
    if copies == world_size:
        yield (
            f"{where} there are {world_size} ranks, so that no table would be sharded; set it "
            "lower, or add nodes"
        )
    optimizers = {"embedding.optimizer": settings.optimizer}
    for name, table in settings.tables.items():
        values = {
            "kernel": table.kernel != "fused" and table.kernel,
            "init_from": table.init_from is not None and "set",
            "new_rows": table.new_rows != "random" and table.new_rows,
        }
        for setting, value in values.items():
            if value:
                yield (
                    f"{where} embedding.tables.{name}.{setting} is {value}, which TorchRec's "
                    "copies do not allow; leave it out, or set it to 1"
                )
        if table.optimizer is not None:
            optimizers[f"embedding.tables.{name}.optimizer"] = table.optimizer
    for setting, optimizer in optimizers.items():
        if optimizer == "adam":
            yield (
                f"{where} {setting} is adam, whose state TorchRec does not average; choose "
                "another optimizer, or set it to 1"
            )
