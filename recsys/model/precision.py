"""bfloat16 in the dense parts of the model, float32 everywhere else.

Autocast runs the matrix products of the trained encoder layers, the projections, the fusion, the
history map and the ranking model in bfloat16. Each of these parts takes and gives float32, so that
lookups, memory bank, losses and metrics around them never see another type; weights, gradients and
optimizer state are float32 by the nature of autocast, and bfloat16 needs no scaling of the loss.

The parts themselves are changed, not the calls of the model, so that training, evaluation,
prediction and the filling of the bank are all alike. It also keeps each part's casts of weights to
itself: autocast remembers them, and a weight that was first cast without gradient would have none.
The frozen layers of encoders stay in float32, whether their outputs are cached or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recsys.data.batch import ContentInput
from recsys.model.em3 import EM3
from recsys.ranking.vectors import MemberLogits, TowerVectors


def dense_parts(em3: EM3) -> dict[str, nn.Module]:
    """What computes in the chosen precision, by name in the model."""
    parts: dict[str, nn.Module] = {}
    if em3.content is not None:
        content = em3.content
        parts |= {f"content.encoders.{name}": part for name, part in content.encoders.items()}
        parts |= {f"content.projections.{name}": part for name, part in content.projections.items()}
        parts |= {"content.fusion": content.fusion, "content.history_map": content.history_map}
    return parts | {"ranking": em3.ranking}


def use_bfloat16(em3: EM3, device: torch.device) -> None:
    """Makes the dense parts compute in bfloat16, for good.

    Raises:
        ValueError: the GPU has no bfloat16.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"precision is bf16, which {torch.cuda.get_device_name(device)} does not compute in "
            "(compute capability 8.0 and later do); set precision to fp32"
        )
    for part in dense_parts(em3).values():
        part.forward = _in_bfloat16(part.forward, device.type)  # type: ignore[method-assign]


def _in_bfloat16(forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_bfloat16(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            output = forward(*arguments, **named)
        return _in_float32(output)

    return in_bfloat16


def _in_float32(
    output: Tensor | ContentInput | MemberLogits | TowerVectors,
) -> Tensor | ContentInput | MemberLogits | TowerVectors:
    if isinstance(output, ContentInput):
        return ContentInput(output.values.float(), output.mask)
    return output.float()
