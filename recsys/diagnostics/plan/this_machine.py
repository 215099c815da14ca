"""Measures this machine's figures, for the description of a run on machines like it."""

from __future__ import annotations

import torch

from embeddings.device_figures import DEVICES, DeviceFigures, FigureOverrides
from embeddings.sharding import free_host_memory
from embeddings.simulated_cluster import Cluster
from recsys.diagnostics.cost.roofline import Anchor, best, measure_anchor

# Default between machines like this one: 25 Gbit/s, shared by the ranks of a node.
CPU_NETWORK_BANDWIDTH = 25e9 / 8
MEASUREMENTS = 3


def find_cluster(
    device: str,
    nodes: int = 1,
    ranks_per_node: int | None = None,
    figures: FigureOverrides | None = None,
    precision: str = "fp32",
) -> Cluster:
    """Return the cluster that the command line names.

    `device` is a name in `DEVICES`, or auto, cpu or cuda for devices like those of this machine.
    The default of `ranks_per_node` are its GPUs, or one CPU. `figures` override the data sheet or
    the measurement. The rate of bf16 is measured only if that is the precision of dense parts.

    Raises:
        ValueError: the device is unknown, or a number or figure is not positive.
    """
    known = [*DEVICES, "cpu", "cuda", "auto"]
    if device not in known:
        raise ValueError(f"device '{device}' is unknown; choose one of {known}")
    if device == "auto":
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
    found = DEVICES.get(device) or _measured(device, ranks_per_node, precision)
    return Cluster(nodes, ranks_per_node, (figures or FigureOverrides()).applied(found))


def _measured(device: str, ranks_per_node: int, precision: str) -> DeviceFigures:
    fp32 = bf16 = _rates(device, torch.float32)
    if precision == "bf16":
        bf16 = _rates(device, torch.bfloat16)
    if device == "cpu":
        share = 1 / ranks_per_node  # of cores and memory
        return DeviceFigures(
            name="cpu of this machine",
            kind="cpu",
            memory_bytes=free_host_memory() // ranks_per_node,
            memory_bandwidth=fp32.bytes_per_second * share,
            fp32_flops=fp32.flops_per_second * share,
            bf16_flops=bf16.flops_per_second * share,
            node_bandwidth=fp32.bytes_per_second * share / 2,  # a copy reads and writes
            network_bandwidth=CPU_NETWORK_BANDWIDTH * share,
        )
    properties = torch.cuda.get_device_properties(0)
    like = next((d for d in DEVICES.values() if d.name in properties.name.lower()), None)
    links = like or DEVICES["a100"]
    return DeviceFigures(
        name=f"{properties.name} of this machine",
        kind="cuda",
        memory_bytes=properties.total_memory,
        memory_bandwidth=fp32.bytes_per_second,
        fp32_flops=fp32.flops_per_second,
        bf16_flops=bf16.flops_per_second,
        node_bandwidth=links.node_bandwidth,
        network_bandwidth=links.network_bandwidth,
    )


def _rates(device: str, dtype: torch.dtype) -> Anchor:
    return best([measure_anchor(device=device, dtype=dtype) for _ in range(MEASUREMENTS)])
