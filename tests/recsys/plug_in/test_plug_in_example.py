"""The README's diff turns a user's script into one with content, and both train on two ranks."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torchrec.datasets.criteo import (
    CAT_FEATURE_COUNT,
    INT_FEATURE_COUNT,
    BinaryCriteoUtils,
)

from recsys.kernels.choice import library_file
from tests.datasets import write_parquet
from tests.recsys.command_runs import run_program

PROJECT = Path(__file__).parents[3]
EXAMPLES = PROJECT / "tests" / "examples"
README = (PROJECT / "recsys" / "plug_in" / "README.md").read_text()
CRITEO_ROWS = 200
SHORT = ["--epochs", "2", "--batches", "4"]


def block(language: str, within: str) -> str:
    """The README's block that has a line."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    (one,) = (text for text in blocks if within in text)
    return one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: his script, his items, Criteo's files, and the script after the diff."""
    root = tmp_path_factory.mktemp("example")
    old_script = (EXAMPLES / "dlrm_before.py").read_text()
    (root / "dlrm_before.py").write_text(old_script)
    (root / "dlrm.py").write_text(old_script)
    (root / "content.yaml").write_text(block("yaml", "item: cat_0"))
    (root / "content.diff").write_text(block("diff", "a/dlrm.py"))
    subprocess.run(["git", "apply", "content.diff"], cwd=root, check=True, capture_output=True)
    items = pa.table(
        {
            "product": range(50),
            "title": [f"product {item}" for item in range(50)],
            "embedding": np.random.default_rng(0).random((50, 8)).astype(np.float32).tolist(),
        }
    )
    write_parquet(root / "shop" / "items" / "part-0.parquet", items)
    for day in range(2):
        write_criteo_day(root / "criteo", day)
    return root


def write_criteo_day(folder: Path, day: int) -> None:
    """A day as Criteo writes it, label, numbers and hexadecimal ids by tabs, and its npy files."""
    random = np.random.default_rng(day)
    folder.mkdir(exist_ok=True)
    rows = []
    for label in random.integers(0, 2, CRITEO_ROWS):
        numbers = [str(random.integers(0, 100)) for _ in range(INT_FEATURE_COUNT)]
        ids = [f"{random.integers(0, 2**31):08x}" for _ in range(CAT_FEATURE_COUNT)]
        rows.append("\t".join([str(label), *numbers, *ids]))
    (folder / f"day_{day}.tsv").write_text("\n".join(rows) + "\n")
    files = [str(folder / f"day_{day}_{name}.npy") for name in ("dense", "sparse", "labels")]
    BinaryCriteoUtils.tsv_to_npys(str(folder / f"day_{day}.tsv"), *files)


def train(script: str, folder: Path, *arguments: str) -> list[tuple[float, float]]:
    """(training loss, validation AUC) of each epoch, as the script prints them."""
    variables = {"PYTHONPATH": str(PROJECT), "XDG_CACHE_HOME": str(folder / "cache")}
    variables["TORCH_EXTENSIONS_DIR"] = str(library_file().parents[1])  # compiled by `make install`
    argv = ["--standalone", "--nproc-per-node", "2", script, *SHORT, *arguments]
    process = run_program("torchrun", *argv, folder=folder, **variables)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    epochs = re.findall(r"training loss (\d\.\d+), validation AUC (\d\.\d+)", process.stdout)
    return [(float(loss), float(auc)) for loss, auc in epochs]


def test_the_diff_changes_four_lines(folder: Path) -> None:
    lines = (folder / "content.diff").read_text().splitlines()
    new_lines = [line for line in lines if re.match(r"\+(?!\+)\s*\S", line)]
    old_lines = [line for line in lines if re.match(r"-(?!-)\s*\S", line)]

    assert (len(new_lines), len(old_lines)) == (4, 2)
    assert "Four lines" in README


def test_files_of_the_example_are_those_of_the_page() -> None:
    assert (EXAMPLES / "content.diff").read_text() == block("diff", "a/dlrm.py")
    assert (EXAMPLES / "content.yaml").read_text() == block("yaml", "item: cat_0")


@pytest.mark.long
@pytest.mark.parametrize("script", ["dlrm_before.py", "dlrm.py"])
def test_both_scripts_train_on_random_batches(folder: Path, script: str) -> None:
    (first, auc), (second, _) = train(script, folder)

    assert second < first and 0 < auc < 1


@pytest.mark.long
def test_the_script_with_content_trains_on_criteos_files(folder: Path) -> None:
    (first, auc), (second, _) = train("dlrm.py", folder, "--criteo", "criteo")

    assert second < first and 0 < auc < 1
