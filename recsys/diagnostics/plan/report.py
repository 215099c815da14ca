"""`recsys describe`: the cluster that its options name, and the description as text tables."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from embeddings.hardware import find_hardware
from embeddings.plan_text import align_columns
from embeddings.sharding import free_host_memory
from embeddings.simulated_cluster import DEVICES, Cluster, Device
from recsys.config import Config
from recsys.diagnostics.plan.description import Description, describe, in_bytes
from recsys.distributed.log import print_table
from recsys.doctor import unusable_gpu
from recsys.kernels.choice import COSTS
from recsys.storage.files import write_json
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

MAX_RANKS_SHOWN = 16


def describe_run(
    config: Config, data: str, cluster: Cluster, rows: dict[str, int], json_file: Path | None
) -> None:
    """Print what `describe` returns for a run, and write its numbers to `json_file`."""
    if json_file is not None:
        check_output(json_file)
    description = describe(config, data, cluster, rows)
    print_table(format_description(description))
    if json_file is not None:
        write_json(json_file, description.to_json(), indent=2)
        logger.info("written to %s", json_file)


def parse_rows(arguments: list[str]) -> dict[str, int]:
    """Return rows by table from arguments TABLE=NUMBER; another form is a ValueError."""
    rows = {}
    for argument in arguments:
        name, _, number = argument.partition("=")
        try:
            rows[name] = int(float(number.replace("_", "")))
        except ValueError as error:
            raise ValueError(
                f"rows: '{argument}' is not TABLE=NUMBER; write for instance item=4000000000"
            ) from error
    return rows


def find_cluster(
    device: str, nodes: int, ranks_per_node: int | None, memory_bytes: float | None
) -> Cluster:
    """Return the cluster that the command line names; an unusable option is a ValueError.

    `device` is a name in `DEVICES`, or auto, cpu or cuda. `memory_bytes` defaults to the memory in
    `DEVICES`, or that of this machine.
    """
    names = [*DEVICES, "cpu", "cuda", "auto"]
    if device not in names:
        raise ValueError(f"device '{device}' is unknown; choose one of {names}")
    if device == "auto":
        if (reason := unusable_gpu()) is not None:
            raise ValueError(
                f"device is auto, but torch cannot use this machine's GPU: {reason}; name the "
                f"device that is meant: {names[:-1]}"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is cuda, but no GPU is usable here; name the one that is meant: {[*DEVICES]}"
        )
    if ranks_per_node is None:
        ranks_per_node = torch.cuda.device_count() if device == "cuda" else 1
    for name, number in (("nodes", nodes), ("gpus_per_node", ranks_per_node)):
        if not 1 <= number <= 10_000:
            raise ValueError(f"{name} is {number}; give 1 to 10000")
    machine = DEVICES.get(device) or _this_machine(device, ranks_per_node)
    if memory_bytes is not None:
        if not memory_bytes > 0:
            raise ValueError(f"memory_bytes is {memory_bytes}; give a positive number")
        machine = replace(machine, memory_bytes=int(memory_bytes))
    return Cluster(nodes, ranks_per_node, machine)


def _this_machine(device: str, ranks_per_node: int) -> Device:
    share = free_host_memory() // ranks_per_node
    if device == "cpu":
        return Device("cpu of this machine", "cpu", share)
    properties = torch.cuda.get_device_properties(0)
    name, hardware = f"{properties.name} of this machine", find_hardware(properties.name)
    return Device(name, "cuda", properties.total_memory, share, hardware)


def format_description(description: Description) -> str:
    """Return all tables as text, followed by whether the run fits."""
    cluster, device = description.cluster, description.cluster.device
    ranks = f"{cluster.world_size:,} rank{'s' if cluster.world_size > 1 else ''}"
    blocks = [
        f"{ranks} ({cluster.nodes:,} x {cluster.ranks_per_node:,}) on {device.name}: "
        f"{in_bytes(device.memory_bytes)} of memory; {description.training_rows:,} training rows",
        _parts(description),
        _memory(description),
        f"plan\n{_shortened(description.plan)}",
        *_times(description),
        *_without_kernel(description),
        _verdict(description),
    ]
    return "\n\n".join(blocks)


def _parts(description: Description) -> str:
    sized = "weights per rank", "gradients", "optimizer state"
    header = ("part", "parameters", "trained by", "where", *sized)
    rows = []
    for part in description.parts:
        sizes = map(in_bytes, (part.weight_bytes, part.gradient_bytes, part.state_bytes))
        rows.append((part.name, f"{part.parameters:,}", part.trained_by, part.where, *sizes))
    total = f"{sum(part.parameters for part in description.parts):,}"
    text = align_columns([header, *rows, ("total", total, "", "", "", "", "")])
    for name, count in description.frozen_layers.items():
        text += f"\nencoder {name}: {count:,} more run once per item, before training"
    return text


def _memory(description: Description) -> str:
    memory = description.memory
    rows = [
        ("memory per rank", "bytes"),
        ("tables and their optimizers", in_bytes(memory.tables)),
        ("dense parts and their optimizer", in_bytes(memory.dense)),
        ("memory bank", in_bytes(memory.bank)),
        ("total without activations", f"{in_bytes(memory.total)} of {in_bytes(memory.limit)}"),
    ]
    if memory.host_tables:
        host = f"{in_bytes(memory.host_tables)} of {in_bytes(memory.host_limit)}"
        rows.append(("tables in host memory", host))
    text = align_columns(rows)
    if len(sizes := description.table_bytes) > 1:
        ends = in_bytes(min(sizes)), in_bytes(max(sizes))
        text += f"\ntables: {ends[0]} on the emptiest rank, {ends[1]} on the fullest"
    return text


def _shortened(plan: str) -> str:
    """Return the plan with shortened lines for tables of many shards."""
    lines = []
    for line in plan.splitlines():
        shards = line.split(", ")
        if len(shards) > MAX_RANKS_SHOWN:
            line = ", ".join(shards[:4]) + f", ... {len(shards):,} shards"
        lines.append(line[:200].rstrip())
    return "\n".join(lines)


def _times(description: Description) -> list[str]:
    if description.times is None:
        return []
    (total, host_link), device = description.times, description.cluster.device
    text = f"tables per step: {total:.3g} ms on the slowest rank, as TorchRec estimates lookups, "
    text += "updates and exchanges"
    if host_link:
        text += f"; {host_link:.3g} ms of them over the host link"
    if device.hardware.is_unknown:
        text += f"\nbandwidths of {device.name} are unknown: TorchRec's defaults stand in; set "
        text += "embedding.hardware"
    return [text]


def _without_kernel(description: Description) -> list[str]:
    lines = [
        f"  {kernel}: {reason}; a step takes {COSTS[kernel]}"
        for kernel, reason in description.without_kernel.items()
    ]
    return ["\n".join(["without a kernel", *lines])] if lines else []


def _verdict(description: Description) -> str:
    if description.problems:
        return "\n".join(["does not fit", *(f"  {line}" for line in description.problems)])
    memory = description.memory
    free_bytes, other_bytes = memory.limit - memory.total, memory.dense + memory.bank
    reserve = memory.limit * description.cluster.device.hardware.reserved_share
    if other_bytes <= reserve:
        return f"fits: {in_bytes(free_bytes)} per rank are left"
    return (
        f"fits, {in_bytes(free_bytes)} per rank are left; but dense parts and bank take "
        f"{in_bytes(other_bytes)}, and the planner counts on {in_bytes(reserve)} for them"
    )
