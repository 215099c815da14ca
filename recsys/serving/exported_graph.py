"""The ranking graph of a package as a file: exported by torch.export, and compiled to machine code.

Weights are arguments of the operations: a server that exchanges packages reads new weights in
milliseconds, and keeps operations that take a second to load. The file is a PT2 archive
(https://docs.pytorch.org/docs/stable/export/pt2_archive.html).
AOTInductor's code fits one processor type and torch; elsewhere the exported graph runs, with a
warning. Compiled code needs contiguous inputs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Literal, cast
from unittest.mock import patch
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule
from torch.fx.experimental import _config as symbolic_shapes

from recsys.model.precision import InBfloat16, cpu_computes_bfloat16
from recsys.serving.package import GRAPH, Manifest
from recsys.serving.ranking_graph import RankingGraph, RankingInputs

logger = logging.getLogger(__name__)
# This logger warns of sizes that no operation of a loaded graph reads.
logging.getLogger("torch._export.serde.serialize").setLevel(logging.ERROR)

WEIGHTS = "/data/weights/"
CONFIG = "model_weights_config.json"  # names of the weights and their records
NO_OPERATIONS = ("/.data/", "/data/sample_inputs/", f"{WEIGHTS}weight_")
COMPILED = "compiled.pt2"
Compile = bool | Literal["auto"]
Graph = Callable[..., Tensor]
# Candidates, history items and events of further histories with which an export is compared.
CHECKED_SIZES = ((2, 3, 4), (1, 1, 0), (3, 0, 2), (1, 0, 1), (4, 70, 70))
TRACED_SIZE = (5, 7, 3)
TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2e-2  # compiled code may round units of bfloat16 less often
HISTORY_INPUTS = ("history", "parallel", "history_items", "history_content")


class ExportedGraph:
    """A graph that runs: `operations` on the `state` (weights and constants) and the inputs.

    `digest` is the hash of the file without weights and examples.
    """

    def __init__(self, operations: nn.Module, state: dict[str, Tensor], digest: str) -> None:
        self.operations, self.digest, self._state = operations, digest, state

    def __call__(self, *arguments: Tensor | list[Tensor]) -> Tensor:
        outputs: tuple[Tensor, ...] = self.operations(*self._state.values(), *_flat(arguments))
        return outputs[0]

    @staticmethod
    def load(path: Path, previous: object = None) -> ExportedGraph:
        """Load a graph; take over the operations of `previous` if the file has the same."""
        with ZipFile(path) as archive:
            digest = _digest_of_operations(archive)
            if isinstance(previous, ExportedGraph) and previous.digest == digest:
                return previous.with_weights(archive)
        program = torch.export.load(path)
        return ExportedGraph(program.graph_module, _state_of(program), digest)

    def with_weights(self, archive: ZipFile) -> ExportedGraph:
        root = archive.namelist()[0].split("/")[0]
        records = json.loads(archive.read(f"{root}{WEIGHTS}{CONFIG}"))["config"]
        state = dict(self._state)
        for name, record in records.items():
            content, old = archive.read(f"{root}{WEIGHTS}{record['path_name']}"), state[name]
            if old.numel():
                flat = torch.frombuffer(bytearray(content), dtype=old.dtype)
                state[name] = flat.as_strided(old.shape, old.stride(), old.storage_offset()).clone()
        return ExportedGraph(self.operations, state, self.digest)


def _flat(arguments: Iterable[Tensor | list[Tensor]]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for argument in arguments:
        tensors += argument if isinstance(argument, list) else [argument]
    return tensors


def _state_of(program: ExportedProgram) -> dict[str, Tensor]:
    tensors = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    are_inputs = [spec.kind is InputKind.USER_INPUT for spec in specs]
    assert are_inputs == sorted(are_inputs), specs  # inputs come after the state
    names = [str(spec.target) for spec in specs[: len(specs) - sum(are_inputs)]]
    return {name: tensors[name].detach() for name in names}


def _digest_of_operations(archive: ZipFile) -> str:
    digest = hashlib.sha256()
    for name in sorted(archive.namelist()):
        record = name[name.index("/") :]  # without the archive's top folder
        if not record.startswith(NO_OPERATIONS):
            digest.update(f"{record} {archive.getinfo(name).file_size} ".encode())
            digest.update(archive.read(name))
    return digest.hexdigest()


def export_graph(
    graph: RankingGraph, shapes: RankingInputs, name: str, path: Path
) -> ExportedProgram:
    """Export the graph for any number of candidates and history items, and write it to a file.

    `shapes` are inputs with the model's widths. A model that torch.export refuses, or a graph that
    accepts only some sizes or computes other logits than the model, is a ValueError.
    """
    traced = random_like(shapes, *TRACED_SIZE)
    sizes = {0: torch.export.Dim.AUTO}
    axes = tuple(
        [sizes] * len(value) if isinstance(value, list) else sizes for value in traced.arguments()
    )
    try:
        with torch.no_grad(), any_length():
            program = torch.export.export(
                graph, traced.arguments(), dynamic_shapes=(axes,), strict=False
            )
            # A region of autocast without operations can be written, but not read.
            program.graph.eliminate_dead_code()
            program.graph_module.recompile()
            _require_any_length(program, traced)
            torch.export.save(program, path)
            with _same_operations(graph):
                compare_graphs(ExportedGraph.load(path), graph, shapes)
    except Exception as error:  # torch.export raises errors of many types
        raise ValueError(
            f"ranking.name '{name}' cannot be exported: {type(error).__name__}: {error}; replace "
            "the operation that torch.export names, or whose shape depends on values"
        ) from error
    return program


def _same_operations(graph: RankingGraph) -> AbstractContextManager[Any]:
    """Make a graph with parts in bfloat16 use the operations of its export.

    Kernels of attention and dot products round to bfloat16 after other operations.
    """
    if any(isinstance(module, InBfloat16) for module in graph.modules()):
        return patch.object(torch.compiler, "is_exporting", lambda: True)
    return nullcontext()


def any_length() -> AbstractContextManager[None]:
    """Keep branches on traced lengths from deciding the code for other lengths."""
    return cast(Any, symbolic_shapes).patch(backed_size_oblivious=True)


def _require_any_length(program: ExportedProgram, inputs: RankingInputs) -> None:
    """Raise a ValueError if a branch made torch.export silently fix or bound a length."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names = (name for name, value in vars(inputs).items() for _ in _flat([value]))
    for argument, name in zip(program.graph_signature.user_inputs, names):
        rows = "history items" if name in HISTORY_INPUTS else "candidates"
        rows = "events of a further history" if name.startswith("further") else rows
        length = values[argument].shape[0]
        symbol = length.node.expr if isinstance(length, torch.SymInt) else None
        if (bounds := program.range_constraints.get(symbol)) is None:
            raise ValueError(
                f"the graph fixes the number of {rows} to {length}; read it from tensor.shape, as "
                "len(tensor) is a constant in the graph"
            )
        if bounds.lower > 2 or bounds.upper < sys.maxsize:
            raise ValueError(f"the graph takes {bounds.lower} to {bounds.upper} {rows} only")


def compare_graphs(
    graph: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    shapes: RankingInputs,
    tolerance: float = TOLERANCE,
) -> None:
    """Require equal outputs of two graphs for any numbers of rows, by an AssertionError."""
    for size in CHECKED_SIZES:
        inputs = random_like(shapes, *size).arguments()
        torch.testing.assert_close(
            graph(*inputs), expected(*inputs), rtol=tolerance, atol=tolerance
        )


def random_like(
    shapes: RankingInputs, num_rows: int, num_items: int, num_events: int
) -> RankingInputs:
    """Return random inputs with the widths of `shapes`; further histories differ in length."""
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor, length: int) -> Tensor:
        if like.dtype == torch.int64:
            return torch.zeros(length, dtype=torch.int64)
        return torch.randn(length, like.shape[1], generator=generator)

    inputs: dict[str, Any] = {}
    for name, value in vars(shapes).items():
        if name == "pooled":
            inputs[name] = [random(like, num_rows) for like in value]
        elif name.startswith("further"):
            inputs[name] = [random(like, num_events + index) for index, like in enumerate(value)]
        else:
            inputs[name] = random(value, num_items if name in HISTORY_INPUTS else num_rows)
    return RankingInputs(**inputs)


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


def compile_graph(program: ExportedProgram, path: Path, option: Compile) -> dict[str, str]:
    """Compile an exported graph, compare both, and return what the code needs, for a manifest.

    Where that fails: with `auto` a warning and an empty result, else a ValueError.
    """
    logger.info("compiling the graph takes a minute; --compile false leaves it out")
    try:
        with any_length():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        assert program.example_inputs is not None
        shapes = RankingInputs(*program.example_inputs[0])
        with torch.inference_mode():
            exported = program.module(check_guards=False)
            tolerance = BFLOAT16_TOLERANCE if _has_bfloat16(program) else TOLERANCE
            compare_graphs(_load_compiled(path), exported, shapes, tolerance)
    except Exception as error:  # AOTInductor raises errors of many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        problem = f"AOTInductor cannot compile this model ({reason}); set --compile false"
        if option is True:
            raise ValueError(f"--compile: {problem}") from error
        logger.warning("--compile: %s", problem)
        path.unlink(missing_ok=True)
        return {}
    return _this_machine()


def _has_bfloat16(program: ExportedProgram) -> bool:
    modules = (child for child in program.graph_module.modules() if isinstance(child, GraphModule))
    values = (node.meta.get("val") for child in modules for node in child.graph.nodes)
    return any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in values)


def graph_file(folder: Path, manifest: Manifest) -> str:
    """Return the file of the graph to run: the compiled one if it fits this machine."""
    if manifest.precision == "bf16" and not cpu_computes_bfloat16():
        logger.warning(
            f"{folder}: exported with --precision bf16, but this CPU has no instructions for "
            "bfloat16 (avx512_bf16 or amx_bf16 on x86), so requests are slower; export the run "
            "without it"
        )
    if not manifest.compiled:
        return GRAPH
    if manifest.compiled == _this_machine():
        return COMPILED
    compiled_for, host = (", ".join(info.values()) for info in (manifest.compiled, _this_machine()))
    logger.warning(
        f"{folder}: compiled for {compiled_for}, but this is {host}, so the graph runs uncompiled; "
        "export the run here"
    )
    return GRAPH


def load_graph(path: Path, previous: Graph | None = None) -> Graph:
    """Load an exported or a compiled graph; see `ExportedGraph.load`."""
    return _load_compiled(path) if path.name == COMPILED else ExportedGraph.load(path, previous)


def _this_machine() -> dict[str, str]:
    return {
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": version("torch"),
    }


def _load_compiled(path: Path) -> Graph:
    # Unpacked to a folder that is removed at once: a copy by torch stays until the loader is
    # deleted, or for ever if the process is killed.
    with TemporaryDirectory(prefix="recsys-graph-") as folder, ZipFile(path) as archive:
        archive.extractall(folder)
        (unpacked,) = Path(folder).iterdir()
        loader = torch._C._aoti.AOTIModelPackageLoader(str(unpacked), "model", False, 1, -1)
    lock = Lock()

    def call(*arguments: Tensor | list[Tensor]) -> Tensor:
        inputs = [tensor.contiguous() for tensor in _flat(arguments)]
        with lock:  # a second call would wait inside and hold the GIL, which the first needs
            return loader.boxed_run(inputs)[0]

    return call
