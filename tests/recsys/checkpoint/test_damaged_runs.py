"""A run whose files were edited, swapped or replaced by pipes: refused by name, never read wrongly.

Each change is made in a copy of one run, in this process.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.checkpoint.run_folder import check_metrics
from recsys.cli import main
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.compare import compare_runs
from recsys.evaluation.predict import evaluate
from recsys.training.train import train
from tests.recsys.checkpoint.schema_runs import write_data
from tests.recsys.checkpoint.stopped_runs import config_of

ARGV = ["--content", "none", "--contrastive.weight", "0", "--embedding.skip", "[]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    write_data(folder / "data")
    with joined_ranks("cpu") as ranks:
        train(
            config_of(folder, *ARGV, "--epochs", "1"), str(folder / "data"), folder / "run", ranks
        )
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def doubled_counts(file: Path) -> None:
    items, counts = np.load(file)
    np.save(file, np.stack([items, 2 * counts]))


def turned_map(file: Path) -> None:
    """The same ids, each with the row of another."""
    table = pq.read_table(file)
    rows = table["row"].to_numpy()[::-1]
    pq.write_table(table.set_column(table.column_names.index("row"), "row", pa.array(rows)), file)


def evaluated(run: Path, data: Path | None = None) -> dict[str, Any]:
    with joined_ranks("cpu") as ranks:
        return evaluate(run, str(data) if data else None, "test", ranks, "cpu")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("item_counts.npy", doubled_counts),
        ("vocabulary/item.parquet", turned_map),
        (
            "schema.yaml",
            lambda file: file.write_text(file.read_text().replace("seed: 1", "seed: 0")),
        ),
    ],
)
def test_a_file_that_decides_results_must_be_that_of_the_checkpoint(
    folder: Path, run: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    data = Path(shutil.copytree(folder / "data", tmp_path / "data"))
    change(run / name)
    if (data / name).exists():  # a map must be that of the run
        change(data / name)
    with pytest.raises(ValueError, match=re.escape(name)):
        evaluated(run, data)


def test_scores_and_metrics_must_be_of_the_best_model(run: Path) -> None:
    compare_runs([run, run], "test")
    check_metrics(run)
    metrics = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(metrics.replace('"auc"', '"gauc"', 1))
    with pytest.raises(ValueError, match=r"metrics\.json"):
        check_metrics(run)
    (run / "metrics.json").write_text(metrics)
    with joined_ranks("cpu") as ranks:
        other = config_of(run.parent, *ARGV, "--epochs", "1", "--seed", "1")
        train(other, (run / "data.txt").read_text().strip(), run.parent / "other", ranks)
    best = run / "checkpoints" / "best"
    shutil.rmtree(best)
    shutil.copytree(run.parent / "other" / "checkpoints" / "best", best)
    with pytest.raises(ValueError, match=r"scores_test\.parquet"):
        compare_runs([run, run.parent / "other"], "test")
    with pytest.raises(ValueError, match=r"checkpoints/best"):
        check_metrics(run)
    out = run.parent / "tables.parquet"
    assert main(["export-tables", "--run", str(run), "--out", str(out)]) == 1
    assert not out.exists()


def test_tables_of_a_step_are_not_exported_as_those_of_the_best_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "checkpoints" / "best"
    step = max(best.parent.glob("step-*"))
    shutil.rmtree(best)
    step.rename(best)
    out = run.parent / "tables.parquet"
    assert main(["export-tables", "--run", str(run), "--out", str(out)]) == 1
    assert str(best) in capsys.readouterr().err
    assert not out.exists()


def test_damaged_tables_are_not_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = (run / "checkpoints" / "best").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    out = run.parent / "tables.parquet"
    assert main(["export-tables", "--run", str(run), "--out", str(out)]) == 1
    assert shard.name in capsys.readouterr().err and not out.exists()
