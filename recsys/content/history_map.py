"""The map of the history's content vectors, kept cheap by LoRA.

EM3 applies "LoRA in the sequential modelling of user content interest": vectors of history items
are read from the memory bank without gradient and pass a frozen map plus a low-rank trained one,
v W0 + (alpha / r) v A B, so that neither encoders nor a dense map are trained over histories.
The map is applied to unique items, before they are spread over the positions of the history.

Shapes: U unique history items, D content dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import HistorySettings


class HistoryMap(nn.Module):
    """Maps the content vectors of history items.

    Modes: `bank_frozen` keeps W0 (the identity, so that history and target share a space),
    `bank_lora` adds peft's low-rank map, which starts at zero, `bank_dense` and `full` train W0.
    """

    def __init__(self, dim: int, settings: HistorySettings) -> None:
        """Create the map W0 as the identity and, in mode `bank_lora`, its adapter."""
        super().__init__()
        self.map = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.map.weight)
        self.scaling: float | None = None  # alpha / r of the adapter, if there is one
        self.map.requires_grad_(settings.mode in ("bank_dense", "full"))
        if settings.mode == "bank_lora":
            from peft import LoraConfig, inject_adapter_in_model

            lora = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
                target_modules=["map"],
            )
            inject_adapter_in_model(lora, self)
            self.scaling = settings.lora_alpha / settings.lora_rank

    def forward(self, vectors: Tensor) -> Tensor:  # [U, D] -> [U, D]
        """Return the mapped vectors."""
        if self.scaling is None:
            return self.map(vectors)
        # peft's own forward does the same in more and smaller steps.
        layer: Any = self.map
        low = F.linear(vectors, layer.lora_A["default"].weight)
        mapped = F.linear(vectors, layer.base_layer.weight)
        return torch.addmm(mapped, low, layer.lora_B["default"].weight.T, alpha=self.scaling)

    def matrix(self) -> Tensor:  # [D, D]
        """Return the map as one matrix: `forward` of a vector v is matrix @ v."""
        if self.scaling is None:
            return self.map.weight
        layer: Any = self.map
        low, high = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        return torch.addmm(layer.base_layer.weight, high, low, alpha=self.scaling)
