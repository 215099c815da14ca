"""torch.compile of the dense parts in which many small operations can become few.

These are the fusion, each trained layer of the encoders and the ranking model's stacks of layers.
Each is one graph without breaks, for histories, texts and numbers of items of any length. The rest
of a ranking model is left alone: its history arithmetic has kernels of its own, about which a
compiler would only build dozens of fragments.

The parts are compiled in place (`nn.Module.compile`), so that names of parameters, and with them
checkpoints, stay as they are; `print(model)` shows which they are (`recsys.content.wrap`). Frozen
layers run as they are too, or their outputs would differ from those in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, OverArch

from recsys.content.encoders.base import Encoder
from recsys.content.wrap import wrap
from recsys.model.em3 import EM3


class Compiled(nn.Module):
    """Marks a part that is compiled."""


def compiled_parts(em3: EM3) -> dict[str, nn.Module]:
    """Returns the parts that `compile` compiles, by name in the model."""
    wanted: list[nn.Module] = [part for part in em3.ranking.children() if _is_stack(part)]
    if em3.content is not None:
        wanted.append(em3.content.fusion)
        for encoder in em3.content.encoders.values():
            assert isinstance(encoder, Encoder)
            wanted += encoder.trained_parts
    chosen = {id(part) for part in wanted}
    return {name: part for name, part in em3.named_modules() if id(part) in chosen}


def _is_stack(part: nn.Module) -> bool:
    return isinstance(part, nn.Sequential | DenseArch | OverArch)


def compile_dense_parts(em3: EM3, device: torch.device, backend: str = "inductor") -> None:
    """Compiles the dense parts in place; each when it is first called.

    Raises:
        ValueError: torch.compile does not work on this machine.
    """
    if backend == "inductor":
        require_compiler(device)
    for part in compiled_parts(em3).values():
        wrap(part, Compiled)
        part.compile(backend=backend, dynamic=True)


def require_compiler(device: torch.device) -> None:
    """Compiles something small, so that what is missing shows before the first step.

    Raises:
        ValueError: it cannot be compiled; says why and what to install.
    """
    try:
        if device.type == "cpu":
            # What was compiled once is found in a cache, even where the compiler is gone.
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:
        cause = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise ValueError(
            f"compile is true, but torch.compile does not work for {device.type} on this machine "
            f"({cause}); install a C++ compiler and Python's headers (Debian: g++ python3-dev; "
            "another compiler is named by the environment variable CXX), or set compile to false"
        ) from error


def _small(values: Tensor) -> Tensor:
    return values + 1
