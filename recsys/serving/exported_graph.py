"""The exported graph of a package, apart from its weights.

A run that trains on is exported with equal operations and other weights. To deserialise operations
takes a second of Python, in which requests wait for the interpreter; to read weights, milliseconds.
So a server that exchanges packages keeps the operations, which take weights as arguments, and
exchanges the weights. The file is a PT2 archive, a ZIP file with a record for each weight
(https://docs.pytorch.org/docs/stable/export/pt2_archive.html).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

WEIGHTS = "/data/weights/"
CONFIG = "model_weights_config.json"  # names of the weights and their records
NO_OPERATIONS = ("/.data/", "/data/sample_inputs/", f"{WEIGHTS}weight_")


class ExportedGraph:
    """A graph that runs.

    Args:
        operations: the graph; its first arguments are the state, its others the inputs.
        state: weights and constants by name, in the order of the arguments.
        digest: hash of all that the file has besides weights and examples.
    """

    def __init__(self, operations: nn.Module, state: dict[str, Tensor], digest: str) -> None:
        self.operations, self.digest = operations, digest
        self._state = state

    def __call__(self, *arguments: Tensor | list[Tensor]) -> Tensor:
        """Run the graph on its inputs."""
        inputs: list[Tensor] = []
        for argument in arguments:
            inputs += argument if isinstance(argument, list) else [argument]
        outputs: tuple[Tensor, ...] = self.operations(*self._state.values(), *inputs)
        return outputs[0]

    @staticmethod
    def load(path: Path, previous: object = None) -> ExportedGraph:
        """Load a graph; take over the operations of `previous` if those of the file are equal."""
        with ZipFile(path) as archive:
            digest = _digest_of_operations(archive)
            if isinstance(previous, ExportedGraph) and previous.digest == digest:
                return previous.with_weights(archive)
        program = torch.export.load(path)
        return ExportedGraph(program.graph_module, _state_of(program), digest)

    def with_weights(self, archive: ZipFile) -> ExportedGraph:
        """Return a graph of the same operations with the weights of a file."""
        root = _root_of(archive)
        records = json.loads(archive.read(f"{root}{WEIGHTS}{CONFIG}"))["config"]
        state = dict(self._state)
        for name, record in records.items():
            content, old = archive.read(f"{root}{WEIGHTS}{record['path_name']}"), state[name]
            if old.numel():
                flat = torch.frombuffer(bytearray(content), dtype=old.dtype)
                state[name] = flat.as_strided(old.shape, old.stride(), old.storage_offset()).clone()
        return ExportedGraph(self.operations, state, self.digest)


def _state_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Return what the graph takes besides inputs."""
    tensors = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    are_inputs = [spec.kind is InputKind.USER_INPUT for spec in specs]
    assert are_inputs == sorted(are_inputs), specs  # behind the state
    names = [str(spec.target) for spec in specs[: len(specs) - sum(are_inputs)]]
    return {name: tensors[name].detach() for name in names}


def _root_of(archive: ZipFile) -> str:
    return archive.namelist()[0].split("/")[0]


def _digest_of_operations(archive: ZipFile) -> str:
    """Return the hash of all records that describe operations, constants and names of weights."""
    root, digest = _root_of(archive), hashlib.sha256()
    for name in sorted(archive.namelist()):
        if not (record := name.removeprefix(root)).startswith(NO_OPERATIONS):
            digest.update(f"{record} {archive.getinfo(name).file_size} ".encode())
            digest.update(archive.read(name))
    return digest.hexdigest()
