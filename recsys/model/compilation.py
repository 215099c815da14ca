"""Applies torch.compile to the fusion, trained encoder layers and the ranking model's MLPs.

Attention to histories has kernels that would break a graph. Frozen layers must equal the cache.
"""

from __future__ import annotations

import torch
from torch import nn
from torchrec.models.dlrm import DenseArch, OverArch

from recsys.content.encoders.base import Encoder
from recsys.content.wrap import wrap
from recsys.model.em3 import EM3

STACKS = (nn.Sequential, DenseArch, OverArch)


class Compiled(nn.Module):
    """Wrapper that marks a compiled part."""


def compiled_parts(em3: EM3) -> dict[str, nn.Module]:
    """Return the parts that `compile` compiles, by name in the model."""
    parts: list[nn.Module] = [part for part in em3.ranking.children() if isinstance(part, STACKS)]
    if em3.content is not None:
        parts.append(em3.content.fusion)
        for encoder in em3.content.encoders.values():
            assert isinstance(encoder, Encoder)
            parts += encoder.trained_parts
    part_ids = {id(part) for part in parts}
    return {name: part for name, part in em3.named_modules() if id(part) in part_ids}


def compile_dense_parts(em3: EM3, device: torch.device, backend: str = "inductor") -> None:
    """Compile the dense parts in place; each is compiled at its first call."""
    if backend == "inductor":
        require_compiler(device)
    for part in compiled_parts(em3).values():
        wrap(part, Compiled)
        part.compile(backend=backend, dynamic=True)


def require_compiler(device: torch.device) -> None:
    """Compile a tiny function, so that a missing compiler is reported before the first step."""
    try:
        if device.type == "cpu":
            # torch may load the function from its cache even if the compiler has been removed.
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        torch.compile(lambda values: values + 1)(torch.ones(8, device=device))
    except Exception as error:
        cause = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise ValueError(
            f"compile is true, but torch.compile does not work for {device.type} on this machine "
            f"({cause}); install a C++ compiler and Python's headers (Debian: g++ python3-dev; "
            "another compiler is named by the environment variable CXX), or set compile to false"
        ) from error
