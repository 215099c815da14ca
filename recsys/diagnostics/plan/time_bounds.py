"""Compute the least time of a step's parts on given devices, and the bottleneck of each.

Arithmetic runs at the rate of matrix products, memory traffic at the bandwidth of the device's
memory, collectives at that of the links within and between nodes. Parts do not overlap here; on
real devices some do, and all run below these rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embeddings.simulated_cluster import Cluster
from recsys.diagnostics.cost.communication import Sent
from recsys.diagnostics.cost.roofline import Anchor
from recsys.diagnostics.cost.work import PartCost, Work


@dataclass(frozen=True)
class TimeBound:
    """One part of a step on one rank; seconds are of forward and backward together."""

    name: str
    arithmetic_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def bound_by(self) -> str:
        """Return the slowest resource: arithmetic, memory or network."""
        kinds = ("arithmetic", "memory", "network")
        return max(kinds, key=lambda kind: float(getattr(self, f"{kind}_seconds")))


def time_bounds(
    costs: Sequence[PartCost], sent: Sequence[Sent], cluster: Cluster, precision: str
) -> list[TimeBound]:
    """Return the bounds of the parts on a rank, then the bounds of its collectives.

    `precision` is that of the dense parts: fp32 or bf16.
    """
    device = cluster.device
    flops = device.bf16_flops if precision == "bf16" else device.fp32_flops
    anchor = Anchor(flops, device.memory_bandwidth)
    bounds = []
    for part in costs:
        both = part.forward + part.backward
        arithmetic, memory = both.flops / flops, both.bytes / device.memory_bandwidth
        seconds = part.roofline(anchor)
        bounds.append(TimeBound(part.name, arithmetic, memory, seconds=seconds))
    for kind in sent:
        where = replace(cluster, ranks_per_node=cluster.ranks_per_node // kind.copies)
        if kind.stays_in_node:
            where = replace(where, nodes=1)
        seconds = where.seconds_to_send(kind.bytes, spread=not kind.is_ring)
        bounds.append(TimeBound(f"sending {kind.name}", network_seconds=seconds, seconds=seconds))
    return bounds


def backward_outputs(costs: Sequence[PartCost]) -> float:
    """Return the bytes of products kept for the backward: a lower estimate of activations."""
    return sum(part.forward.outputs for part in costs if part.backward != Work())
