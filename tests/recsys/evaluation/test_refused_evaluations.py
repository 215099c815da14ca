"""Data and options that a run's evaluation, prediction or report cannot use, named in time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import load_config
from recsys.diagnostics.run_report import command
from recsys.diagnostics.run_report.command import report_run
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation import predict as prediction
from recsys.evaluation.predict import evaluate, load_run, predict
from recsys.training.train import train
from tests.datasets import FEATURE_WIDTH, write_dataset
from tests.recsys.command_runs import TINY
from tests.recsys.weighted_data import change_columns, table_of, write_split


class Trained(NamedTuple):
    data: Path
    run: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose items have stored features alone."""
    folder = tmp_path_factory.mktemp("refused")
    data = write_dataset(folder / "data")
    words = ["--content.modalities", "{clip: {kind: feature, column: clip}}", "--batch_size", "16"]
    words += ["--best_model_by", "auc", "--cache", str(folder / "cache")]
    with joined_ranks("cpu") as ranks:
        train(load_config(TINY, words), str(data), folder / "run", ranks)
    return Trained(data, folder / "run")


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with joined_ranks("cpu") as ranks:
        yield ranks


def not_called(*arguments: object) -> None:
    raise AssertionError("the model was loaded")


def widen(data: Path) -> None:
    """Give the stored features of items one value more."""
    file = data / "items" / "part-0.parquet"
    items = pq.read_table(file)
    wide = [None if clip is None else [*clip, 0.5] for clip in items["clip"].to_pylist()]
    place = items.column_names.index("clip")
    pq.write_table(items.set_column(place, "clip", pa.array(wide, items["clip"].type)), file)


def test_features_of_another_width_are_refused_by_file_column_and_both_widths(
    trained: Trained, tmp_path: Path, alone: Ranks
) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    widen(data)
    with pytest.raises(ValueError, match=f"{data}/items: column 'clip'") as caught:
        load_run(trained.run, str(data), alone, "cpu")
    for width in (FEATURE_WIDTH, FEATURE_WIDTH + 1):
        assert f"features of {width}" in str(caught.value)


def without_weight(folder: Path, data: Path) -> Path:
    """A copy of the data whose test rows have weight 0."""
    copied = shutil.copytree(data, folder / "data")
    table = table_of(copied, "test")
    write_split(copied, "test", table.append_column("times", pa.array(np.zeros(len(table)))))
    change_columns(copied, times={"kind": "weight"})
    return copied


@pytest.mark.parametrize("call", ["evaluate", "report"])
def test_weights_that_are_all_0_are_refused(
    trained: Trained, tmp_path: Path, alone: Ranks, call: str
) -> None:
    data = str(without_weight(tmp_path, trained.data))
    with pytest.raises(ValueError, match=r"data/test: column 'times' is 0 in all rows"):
        if call == "evaluate":
            evaluate(trained.run, data, "test", alone, "cpu")
        else:
            report_run(trained.run, data, tmp_path / "page.html", alone, "cpu")


def existing(table: pa.Table) -> list[pa.Table]:
    return [table.append_column("prediction_liked", table["price"])]


def differing(table: pa.Table) -> list[pa.Table]:
    return [table, table.append_column("more", table["price"])]


@pytest.mark.parametrize(
    ("tables", "words"),
    [(existing, "'prediction_liked' already"), (differing, r"1\.parquet: its columns differ")],
)
def test_inputs_that_no_prediction_can_be_added_to_are_refused_before_the_model_is_loaded(
    trained: Trained,
    tmp_path: Path,
    alone: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    tables: Callable[[pa.Table], list[pa.Table]],
    words: str,
) -> None:
    monkeypatch.setattr(prediction, "load_run", not_called)
    inputs = []
    for number, table in enumerate(tables(table_of(trained.data, "test"))):
        inputs.append(str(tmp_path / f"{number}.parquet"))
        pq.write_table(table, inputs[-1])
    with pytest.raises(ValueError, match=words):
        predict(trained.run, inputs, tmp_path / "out" / "out.parquet", None, alone, "cpu")


def test_a_split_without_files_is_refused_before_the_model_is_loaded(
    trained: Trained, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "load_run", not_called)
    with pytest.raises(ValueError, match=r"data/holdout: no \*\.parquet files.*--split"):
        evaluate(trained.run, None, "holdout", alone, "cpu")


@pytest.mark.parametrize(
    ("column", "words"), [("colour", "'colour' is missing"), ("clip", "'clip' .*list")]
)
def test_a_column_that_cannot_colour_maps_is_refused_before_the_model_is_loaded(
    trained: Trained,
    tmp_path: Path,
    alone: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    column: str,
    words: str,
) -> None:
    monkeypatch.setattr(command, "load_run", not_called)
    with pytest.raises(ValueError, match=rf"items/part-0\.parquet: column {words}.*--colour-by"):
        report_run(trained.run, None, tmp_path / "page.html", alone, "cpu", column)
