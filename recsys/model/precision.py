"""bfloat16 in the dense parts of the model, and torch.compile of some of them.

Wrapping each part limits autocast's cache of cast weights to that part. Not compiled are attention
to histories, whose kernels break graphs, and frozen layers, whose outputs must equal the cache.
"""

import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torchrec.models.dlrm import DenseArch, OverArch

from embeddings.host import is_host
from recsys.config import Config
from recsys.content.branch import ContentBranch, HistoryMap
from recsys.content.encoders.base import Encoder
from recsys.content.vectors import ItemRows
from recsys.content.wrap import wrap
from recsys.data.batch import Batch
from recsys.data.items.kind import ContentInput
from recsys.model.em3 import EM3

logger = logging.getLogger(__name__)


class InBfloat16(nn.Module):
    """Wrapper of a module that computes in bfloat16 and returns float32."""

    device_type: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, torch.bfloat16):
            output = super().forward(*args, **kwargs)
        if isinstance(output, ContentInput):
            return ContentInput(output.values.float(), output.mask)
        return output.float()  # of a Tensor, or of the vectors and logits of ranking models


class InFloat32(nn.Module):
    """Wrapper of a module that computes in float32, also where one in bfloat16 calls it."""

    device_type: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, enabled=False):
            return super().forward(*args, **kwargs)


def dense_modules(em3: EM3) -> dict[str, nn.Module]:
    """Return the modules that compute in the chosen precision, by name in the model."""
    content = {} if em3.content is None else content_modules(em3.content)
    modules = {f"content.{name}": module for name, module in content.items()}
    if em3.further_histories is not None:
        modules["further_histories"] = em3.further_histories
    return modules | {"ranking": em3.ranking}


def content_modules(content: ContentBranch) -> dict[str, nn.Module]:
    """Return the content branch's modules that compute in the chosen precision, by name in it."""
    modules = {f"encoders.{name}": module for name, module in content.encoders.items()}
    modules |= {f"projections.{name}": module for name, module in content.projections.items()}
    return modules | {"fusion": content.fusion, "history_map": content.history_map}


def use_bfloat16(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Make modules compute in bfloat16, permanently."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"precision is bf16, which {torch.cuda.get_device_name(device)} does not compute in "
            "(compute capability 8.0 and later do); set precision to fp32"
        )
    is_cpu = device.type == "cpu"
    if is_cpu and not cpu_computes_bfloat16():
        logger.warning(
            "precision is bf16, but this CPU has no instructions for bfloat16 (avx512_bf16 or "
            "amx_bf16 on x86): steps are slower than with fp32; set precision to fp32"
        )
    for module in modules:
        wrap(module, InFloat32 if is_cpu and isinstance(module, HistoryMap) else InBfloat16)
        module.device_type = device.type  # type: ignore[assignment]


def cpu_computes_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


STACKS = (nn.Sequential, DenseArch, OverArch)


class Compiled(nn.Module):
    """Wrapper that marks a compiled module."""


class AsRows(nn.Module):
    """Wrapper of a content branch that in training returns rows, to be read in a compiled graph."""

    def forward(self, batch: Batch) -> Any:
        if not self.training:
            return super().forward(batch)
        branch = cast(ContentBranch, self)
        items, read_history = branch.item_rows(batch)
        return ItemRows(items, read_history())


def compiled_modules(em3: EM3) -> dict[str, nn.Module]:
    """Return the modules that `compile` compiles, by name in the model."""
    modules: list[nn.Module] = [net for net in em3.ranking.children() if isinstance(net, STACKS)]
    if em3.content is not None:
        modules.append(em3.content.fusion)
        for encoder in em3.content.encoders.values():
            assert isinstance(encoder, Encoder)
            modules += encoder.trained_modules
    ids = {id(module) for module in modules}
    return {name: module for name, module in em3.named_modules() if id(module) in ids}


def compile_dense_modules(
    em3: EM3, device: torch.device, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile the dense parts in place; each is compiled at its first call.

    On a CPU these are `compiled_modules`. On a GPU, where kernel launches take long, training has
    two graphs: from tokens to content vectors, and `Scoring`, from vectors to losses. A backbone
    that reads lengths on the host would break `Scoring`: its parts and `compiled_methods` compile.
    """
    if backend == "inductor":
        require_compiler(device)
    options: dict[str, Any] = {"backend": backend, "dynamic": True}
    modules, content = compiled_modules(em3), em3.content
    if not is_host(device):
        modules = {name: module for name, module in modules.items() if name.startswith("ranking.")}
        if content is not None:
            content.compiled = torch.compile(content.encode_frozen, **options)
        if getattr(em3.ranking, "reads_host_lengths", False):
            for module, name in compiled_methods(em3.ranking):
                setattr(module, name, torch.compile(getattr(module, name), **options))
        else:
            modules = {}
            em3.scoring.compiled = torch.compile(em3.scoring.compute, **options)
            if content is not None:
                wrap(content, AsRows)
    for module in modules.values():
        wrap(module, Compiled)
        module.compile(**options)


def compiled_methods(ranking: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield layers and their methods between operations that read lengths on the host."""
    for layer in ranking.modules():
        for name in getattr(layer, "compiled_methods", ()):
            yield layer, name


def uses_tf32(config: Config, device: torch.device) -> bool:
    """Return whether products of float32 matrices may be computed in TF32."""
    return device.type == "cuda" if config.tf32 == "auto" else config.tf32


def compiles_by_default(device: torch.device) -> bool:
    """Return whether `compile: auto` compiles: on GPUs, unless torch.compile fails (a warning)."""
    if device.type != "cuda":
        return False
    try:
        require_compiler(device)
    except ValueError as error:
        logger.warning("steps run uncompiled, with several times as many kernels: %s", error)
        return False
    return True


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
            f"compile is on, but torch.compile does not work for {device.type} on this machine "
            f"({cause}); install a C++ compiler and Python's headers (Debian: g++ python3-dev; "
            "another compiler is named by the environment variable CXX), or set compile to false"
        ) from error
