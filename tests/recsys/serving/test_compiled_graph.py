"""A compiled graph scores as the exported one, where its machine code can run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recsys.distributed.ranks import joined_ranks
from recsys.serving import Scorer, compiled_graph
from recsys.serving.compiled_graph import (
    COMPILED,
    compile_if_possible,
    graph_file,
    is_compiled,
)
from recsys.serving.export import export_run
from recsys.serving.package import GRAPH
from tests.recsys.serving.serving_runs import requests


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
    scorer = Scorer.load(tmp_path / "package")

    scores = np.concatenate([scorer.score(**request) for request in rows])

    assert scorer.graph_file == COMPILED
    np.testing.assert_allclose(scores, predicted, rtol=0, atol=1e-5)
    monkeypatch.setattr(compiled_graph.platform, "machine", lambda: "riscv64")
    elsewhere = Scorer.load(tmp_path / "package")
    assert elsewhere.graph_file == GRAPH and "riscv64" in caplog.text
    np.testing.assert_allclose(elsewhere.score(**rows[0]), predicted[:1], rtol=0, atol=1e-6)
    many = rows[0] | {"candidates": list(range(30))}
    np.testing.assert_allclose(scorer.score(**many), elsewhere.score(**many), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["machine", "instructions", "torch"])
def test_code_for_another_machine_is_not_run(name: str, caplog: pytest.LogCaptureFixture) -> None:
    machine = compiled_graph._this_machine()
    manifest: Any = SimpleNamespace(compiled=machine)
    assert graph_file(Path("package"), manifest) == COMPILED and not caplog.text

    manifest.compiled = machine | {name: "another"}

    assert graph_file(Path("package"), manifest) == GRAPH
    assert "another" in caplog.text and machine[name] in caplog.text


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
    def fail(program: Any, path: Path) -> dict[str, str]:
        path.write_text("half")
        raise ValueError("an operation named sort")

    monkeypatch.setattr(compiled_graph, "compile_graph", fail)
    program: Any = None
    assert compile_if_possible(program, tmp_path / COMPILED, "auto") == {}
    assert "named sort" in caplog.text and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="named sort"):
        compile_if_possible(program, tmp_path / COMPILED, True)
