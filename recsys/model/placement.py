"""Checks of where the ID tables lie: kernels, prefetching and copies that need GPUs."""

from __future__ import annotations

from dataclasses import replace

from recsys.config import Config, ParallelSettings, TableSettings
from recsys.data.schema import Schema


def check_placement(
    config: Config, schema: Schema, device: str, world_size: int, ranks_per_node: int
) -> None:
    """Refuse settings of kernels, prefetching and copies that do not fit the ranks of a job."""
    for name, table in config.embedding.tables.items():
        if problem := _table_problem(name, table, schema, device):
            raise ValueError(f"embedding.tables.{name}.{problem}")
    if problem := _prefetch_problem(config, device):
        raise ValueError(f"embedding.prefetch is true, but {problem}")
    copies = config.embedding.parallel.copies
    if copies > 1:
        problem = _copies_problem(copies, device, world_size, ranks_per_node)
        if problem := problem or _table_without_copies(config):
            raise ValueError(f"embedding.parallel.copies is {copies}, but {problem}")


def placed_for_scoring(config: Config, device: str) -> Config:
    """Return the configuration without settings that only training or only a GPU needs.

    Scores are the same. One copy of the tables is enough, and on CPU all memory is the host's.
    """
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


def _table_problem(name: str, table: TableSettings, schema: Schema, device: str) -> str | None:
    """Return the setting of a table that does not fit, with value and fix, or None."""
    if table.cache_load_factor is not None and table.kernel != "uvm_caching":
        return (
            f"cache_load_factor is {table.cache_load_factor:g}, but kernel {table.kernel} has no "
            "cache; set kernel to uvm_caching, or leave it out"
        )
    if table.kernel == "fused":
        return None
    if device == "cpu":
        return (
            f"kernel is {table.kernel}, but the device is cpu, which has no memory apart from the "
            "host's; set it to fused, or device to cuda on a machine with GPUs"
        )
    vocabulary = schema.vocabulary_of(name)
    if table.kernel == "uvm_caching" and vocabulary is not None and vocabulary.kind == "bounded":
        return (
            "kernel is uvm_caching, but a vocabulary of kind bounded resets rows within training, "
            "behind the cache; set it to uvm or fused, or choose kind exact"
        )
    return None


def _prefetch_problem(config: Config, device: str) -> str | None:
    """Return the reason why rows cannot be prefetched, with the fix, or None."""
    if not config.embedding.prefetch:
        return None
    if device == "cpu":
        return "the device is cpu; set it to false, or device to cuda on a machine with GPUs"
    if all(table.kernel != "uvm_caching" for table in config.embedding.tables.values()):
        return (
            "no table has a cache to fetch into; set embedding.tables.X.kernel to uvm_caching, or "
            "it to false"
        )
    return None


def _copies_problem(copies: int, device: str, world_size: int, ranks_per_node: int) -> str | None:
    """Return the reason why the ranks cannot hold several copies, with the fix, or None."""
    if device == "cpu":
        return "the device is cpu; set it to 1, or device to cuda on machines with GPUs"
    if ranks_per_node % copies:
        return (
            f"a node has {ranks_per_node} ranks, which it does not divide; set it to 1 or another "
            "divisor"
        )
    if copies == world_size:
        return (
            f"there are {world_size} ranks, so that no table would be sharded; set it lower, or "
            "add nodes"
        )
    return None


def _table_without_copies(config: Config) -> str | None:
    """Return the setting of a table that several copies exclude, with the fix, or None."""
    for name, table in config.embedding.tables.items():
        given = {
            "kernel": table.kernel != "fused" and table.kernel,
            "init_from": table.init_from is not None and "set",
            "new_rows": table.new_rows != "random" and table.new_rows,
        }
        for setting, value in given.items():
            if value:
                return (
                    f"embedding.tables.{name}.{setting} is {value}, which TorchRec's copies do not "
                    "allow; leave it out, or set it to 1"
                )
    optimizers = {"embedding.optimizer": config.embedding.optimizer}
    for name, table in config.embedding.tables.items():
        if table.optimizer is not None:
            optimizers[f"embedding.tables.{name}.optimizer"] = table.optimizer
    for setting, optimizer in optimizers.items():
        if optimizer == "adam":
            return (
                f"{setting} is adam, whose state TorchRec does not average; choose another "
                "optimizer, or set it to 1"
            )
    return None
