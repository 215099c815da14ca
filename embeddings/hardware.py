"""Bandwidths for TorchRec's planner, one-directional: from NVIDIA's data sheets or the settings."""

import re
from dataclasses import dataclass, replace
from typing import Self

from torchrec.distributed.planner.types import HardwareConfig

# Share of memory reserved for the dense model, activations and batches. TorchRec's heuristic
# reserves six times the dense parameters, even for frozen ones.
RESERVED_SHARE = 0.15

GB = 10**9 / 1000  # 1 GB/s in TorchRec's unit, bytes per millisecond


@dataclass(frozen=True)
class Hardware:
    """Bandwidths in GB/s; None selects TorchRec's default."""

    memory: float | None = None  # of the device
    host_link: float | None = None  # from the host's memory to the device
    intra_node: float | None = None  # between devices of a node
    inter_node: float | None = None  # between nodes, per device
    reserved_share: float = RESERVED_SHARE

    def or_else(self, other: Self) -> Self:
        """Return a copy whose missing bandwidths come from `other`."""
        names = "memory", "host_link", "intra_node", "inter_node"
        values = {name: getattr(self, name) or getattr(other, name) for name in names}
        return replace(self, **values)

    @property
    def is_unknown(self) -> bool:
        return self.memory is None

    def config(self, device_bytes: int | None, host_bytes: int) -> HardwareConfig:
        """Return TorchRec's `HardwareConfig` of a rank with this memory."""
        bandwidths = {
            "hbm_mem_bw": self.memory,
            "hbm_to_ddr_mem_bw": self.host_link,
            "intra_host_bw": self.intra_node,
            "inter_host_bw": self.inter_node,
        }
        return HardwareConfig(
            hbm_cap_bytes=device_bytes,
            ddr_cap_bytes=host_bytes,
            **{name: value * GB for name, value in bandwidths.items() if value},
        )


# Without NVLink, the GPUs of a node exchange data over the host link.
CARDS = {
    "a100": Hardware(2039, 32, 300),
    "a100-40gb": Hardware(1555, 32, 300),
    "a100-pcie": Hardware(1935, 32, 32),
    "h100": Hardware(3350, 64, 450),
    "h100-pcie": Hardware(2039, 64, 64),
    "h100-nvl": Hardware(3938, 64, 64),  # NVLink bridges join only pairs of cards
    "h200": Hardware(4800, 64, 450),
    "h200-nvl": Hardware(4800, 64, 64),
    "gh200": Hardware(4000, 450, 450),
    "b200": Hardware(8000, 64, 900),
    "gb200": Hardware(8000, 450, 900),
    "l4": Hardware(300, 32, 32),
    "l40s": Hardware(864, 32, 32),
    "a10": Hardware(600, 32, 32),
}


def find_hardware(name: str) -> Hardware:
    """Return the bandwidths of a GPU such as `NVIDIA H100 80GB HBM3`; all None if it is unknown."""
    tokens = re.split(r"[\s-]+", name.lower())
    models = [token for token in tokens if token in CARDS]
    if not models:
        return Hardware()
    variants = [f"{models[0]}-{token}" for token in ("pcie", "nvl", "40gb") if token in tokens]
    return next((CARDS[variant] for variant in variants if variant in CARDS), CARDS[models[0]])
