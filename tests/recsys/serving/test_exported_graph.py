"""Graphs take over equal operations; compiled ones score as exported ones where they can run."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recsys.distributed.ranks import joined_ranks
from recsys.ranking.layers.causal_layers import HstuEncoder, TransformerEncoder
from recsys.ranking.layers.sequence_encoder import Events, SequenceEncoder
from recsys.ranking.layers.sequences import build_sequences
from recsys.ranking.settings import EncoderSettings, HstuSettings, TransformerSettings
from recsys.ranking.vectors import InputDimensions
from recsys.serving import Scorer, exported_graph
from recsys.serving.export import export_run
from recsys.serving.exported_graph import (
    COMPILED,
    ExportedGraph,
    any_length,
    compile_graph,
    graph_file,
    is_compiled,
    load_graph,
)
from recsys.serving.package import GRAPH
from recsys.serving.ranking_graph import SharedHistory
from tests.recsys.serving.serving_runs import requests


class Small(nn.Module):
    """Weights, one of them shared, a buffer, a constant, and a list among the inputs."""

    def __init__(self, width: int, factor: float = 2.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, 1)
        self.shared = self.first
        self.register_buffer("mean", torch.randn(3))
        self.factor = factor

    def forward(self, tensors: list[Tensor], number: Tensor) -> Tensor:
        hidden = self.first(tensors[0] - self.mean) + self.shared(tensors[1])
        return self.second(hidden) * self.factor + number.unsqueeze(1)


def write(path: Path, module: nn.Module) -> nn.Module:
    """Exports a module for any number of rows."""
    inputs = ([torch.randn(5, 3), torch.randn(5, 3)], torch.randn(5))
    any_number = {0: torch.export.Dim.AUTO}
    program = torch.export.export(
        module, inputs, dynamic_shapes=([any_number] * 2, any_number), strict=False
    )
    torch.export.save(program, path)
    return module


def assert_equal(graph: ExportedGraph, module: nn.Module) -> None:
    for rows in (1, 7):
        tensors, number = [torch.randn(rows, 3), torch.randn(rows, 3)], torch.randn(rows)
        torch.testing.assert_close(graph(tensors, number), module(tensors, number))


def test_weights_of_another_file_run_with_the_same_operations(tmp_path: Path) -> None:
    first = write(tmp_path / "first.pt2", Small(4))
    second = write(tmp_path / "second.pt2", Small(4))
    first_graph = ExportedGraph.load(tmp_path / "first.pt2")

    second_graph = ExportedGraph.load(tmp_path / "second.pt2", first_graph)

    assert second_graph.operations is first_graph.operations
    assert_equal(second_graph, second)
    assert_equal(first_graph, first)  # which a request may still use


def test_other_operations_are_loaded(tmp_path: Path) -> None:
    write(tmp_path / "first.pt2", Small(4))
    first_graph = ExportedGraph.load(tmp_path / "first.pt2")
    for name, module in {"wide": Small(5), "factor": Small(4, factor=3.0)}.items():
        path = tmp_path / f"{name}.pt2"
        write(path, module)

        graph = ExportedGraph.load(path, first_graph)

        assert graph.operations is not first_graph.operations
        assert_equal(graph, module)


@pytest.mark.long
def test_a_compiled_package_scores_as_predict(
    package_run: tuple[Path, Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, _, predicted = package_run
    with joined_ranks("cpu") as ranks:
        export_run(folder / "run", tmp_path / "package", "fp32", ranks, compiles=True)
    rows = list(requests(folder / "data"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    scorer = Scorer.load(tmp_path / "package")
    assert list(temporary.iterdir()) == []  # also while the graph is in use

    scores = np.concatenate([scorer.score(**request) for request in rows])

    assert scorer.graph_file == COMPILED
    np.testing.assert_allclose(scores, predicted, rtol=0, atol=1e-5)
    monkeypatch.setattr(exported_graph.platform, "machine", lambda: "riscv64")
    elsewhere = Scorer.load(tmp_path / "package")
    assert elsewhere.graph_file == GRAPH and "riscv64" in caplog.text
    np.testing.assert_allclose(elsewhere.score(**rows[0]), predicted[:1], rtol=0, atol=1e-6)
    body = rows[0] | {"candidates": list(range(30))}
    np.testing.assert_allclose(scorer.score(**body), elsewhere.score(**body), rtol=0, atol=1e-5)


class LatestItems(nn.Module):
    """A sequence encoder in which the latest four items attend to each other."""

    def __init__(self, encoder: type[SequenceEncoder], settings: EncoderSettings) -> None:
        super().__init__()
        dimensions = InputDimensions([], settings.sequence_dim, 0, 0, 1)
        self.encoder = encoder(settings, dimensions, None)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # [L, D], [B, D] -> [B, D]
        history = SharedHistory(targets.shape[0], tokens.shape[0], tokens.device)
        sequences = build_sequences(history)
        ages = sequences.ages().clamp(max=self.encoder.recent_items)
        return self.encoder.encoded(tokens, targets, Events(sequences, ages, None))


@pytest.mark.long
@pytest.mark.parametrize(
    ("encoder", "settings"),
    [
        (TransformerEncoder, TransformerSettings(sequence_dim=8, recent_items=4)),
        (HstuEncoder, HstuSettings(sequence_dim=8, recent_items=4)),
    ],
)
def test_compiled_encoders_take_histories_of_any_length(
    encoder: type[SequenceEncoder], settings: EncoderSettings, tmp_path: Path
) -> None:
    model = LatestItems(encoder, settings).eval()
    inputs, sizes = (torch.randn(3, 8), torch.randn(5, 8)), {0: torch.export.Dim.AUTO}
    with torch.no_grad(), any_length():
        program = torch.export.export(model, inputs, dynamic_shapes=(sizes, sizes), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / COMPILED))
    compiled = torch._inductor.aoti_load_package(str(tmp_path / COMPILED))
    for length in (0, 1, 4, 70):
        tokens, targets = torch.randn(length, 8), torch.randn(2, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens, targets), model(tokens, targets))


def test_threads_call_compiled_code_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call inside another one waited for it with the lock of Python, which both need."""
    inside = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        inside.append(1)
        time.sleep(0.01)
        count = len(inside)
        inside.pop()
        return [inputs[0] + count]

    package = SimpleNamespace(boxed_run=run)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *_: package)
    with ZipFile(tmp_path / COMPILED, "w") as archive:
        archive.writestr("compiled/version", "")
    graph = load_graph(tmp_path / COMPILED)
    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(graph, [torch.zeros(1)] * 8))
    assert counts == [torch.ones(1)] * 8


@pytest.mark.parametrize("name", ["machine", "instructions", "torch"])
def test_code_for_another_machine_is_not_run(name: str, caplog: pytest.LogCaptureFixture) -> None:
    machine = exported_graph._this_machine()
    manifest: Any = SimpleNamespace(compiled=machine, precision="run")
    assert graph_file(Path("package"), manifest) == COMPILED and not caplog.text

    manifest.compiled = machine | {name: "another"}

    assert graph_file(Path("package"), manifest) == GRAPH
    assert "another" in caplog.text and machine[name] in caplog.text


def test_bfloat16_on_a_processor_without_it_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest: Any = SimpleNamespace(compiled={}, precision="bf16")
    monkeypatch.setattr(exported_graph, "cpu_computes_bfloat16", lambda: True)
    assert graph_file(Path("package"), manifest) == GRAPH and not caplog.text

    monkeypatch.setattr(exported_graph, "cpu_computes_bfloat16", lambda: False)

    assert graph_file(Path("package"), manifest) == GRAPH
    assert "--precision bf16" in caplog.text


def test_without_a_compiler_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not is_compiled("auto") and not is_compiled(False)
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=r"no-such-compiler.*CXX"):
        export_run(tmp_path / "run", tmp_path / "out", "fp32", ranks, compiles=True)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_cannot_be_compiled_runs_as_it_is_unless_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(program: Any, package_path: str) -> None:
        Path(package_path).write_text("half")
        raise RuntimeError("an operation named sort")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    program: Any = None
    assert compile_graph(program, tmp_path / COMPILED, "auto") == {}
    assert "named sort" in caplog.text and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="named sort"):
        compile_graph(program, tmp_path / COMPILED, True)
