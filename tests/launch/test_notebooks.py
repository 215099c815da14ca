"""The notebooks run from the first to the last cell, in an empty folder, and hold no outputs."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from recsys.kernels.choice import library_file

FOLDER = Path(__file__).parents[2] / "launch" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL_SECONDS = 600  # a hang; alone on two cores a notebook takes a minute or two


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert cells and outputs == []


@pytest.mark.long
def test_the_notebook_of_the_plug_in_runs_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one runs in `test_wheel`, outside of the sources."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", binaries)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    # Kernels as `make install` compiled them, and no cached vectors.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(library_file().parents[1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(FOLDER / "plug_in.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
