"""The graph of a package as machine code, which AOTInductor makes of it with a C++ compiler.

The code has the vector instructions of the processor that compiled it, and calls the torch it was
compiled for. Elsewhere the exported graph runs in its place, with a warning. Compiled code reads
its inputs by their address, so they must be contiguous.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from recsys.serving.exported_graph import ExportedGraph
from recsys.serving.package import GRAPH, Manifest
from recsys.serving.ranking_graph import RankingInputs, compare_graphs

logger = logging.getLogger(__name__)

COMPILED = "compiled.pt2"
Compile = bool | Literal["auto"]
Graph = Callable[..., Tensor]


def is_compiled(option: Compile) -> bool:
    """Return whether to compile; a ValueError says that a compiler is required but missing."""
    compiler = os.environ.get("CXX", "g++")
    if option is False or shutil.which(compiler) is not None:
        return option is not False
    if option is True:
        raise ValueError(
            f"--compile needs the C++ compiler '{compiler}', which is not found; install it (apt "
            "install g++), name another by the variable CXX, or set --compile auto"
        )
    logger.info("the graph is not compiled, as the C++ compiler '%s' is not found", compiler)
    return False


def compile_if_possible(program: ExportedProgram, path: Path, option: Compile) -> dict[str, str]:
    """Compile a graph as `compile_graph` does; with `auto`, warn and go without if that fails."""
    logger.info("compiling the graph takes a minute; --compile false leaves it out")
    try:
        return compile_graph(program, path)
    except ValueError as error:
        if option is True:
            raise
        logger.warning("%s", error)
        path.unlink(missing_ok=True)
        return {}


def compile_graph(program: ExportedProgram, path: Path) -> dict[str, str]:
    """Compile an exported graph, compare both, and return what the code needs, for a manifest.

    Raises:
        ValueError: the graph cannot be compiled, or the code gives other numbers.
    """
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        assert program.example_inputs is not None
        shapes = RankingInputs(*program.example_inputs[0])
        with torch.inference_mode():
            compare_graphs(_load_compiled(path), program.module(check_guards=False), shapes)
    except Exception as error:  # AOTInductor raises errors of many types
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--compile: AOTInductor cannot compile this model ({type(error).__name__}: {reason}); "
            "set --compile false"
        ) from error
    return _this_machine()


def graph_file(folder: Path, manifest: Manifest) -> str:
    """Return the file of the graph that runs here: the compiled one where it can."""
    if not manifest.compiled:
        return GRAPH
    if manifest.compiled == _this_machine():
        return COMPILED
    logger.warning(
        "%s: compiled for %s, but this is %s, so the graph runs uncompiled; export the run here",
        folder,
        *(", ".join(machine.values()) for machine in (manifest.compiled, _this_machine())),
    )
    return GRAPH


def load_graph(path: Path, previous: Graph | None = None) -> Graph:
    """Load an exported or a compiled graph; see `ExportedGraph.load`."""
    return _load_compiled(path) if path.name == COMPILED else ExportedGraph.load(path, previous)


def _this_machine() -> dict[str, str]:
    """Return what compiled code depends on."""
    return {
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": version("torch"),
    }


def _load_compiled(path: Path) -> Graph:
    run = torch._inductor.aoti_load_package(str(path))

    def contiguous(argument: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(argument, list):
            return [tensor.contiguous() for tensor in argument]
        return argument.contiguous()

    return lambda *arguments: run(*map(contiguous, arguments))
