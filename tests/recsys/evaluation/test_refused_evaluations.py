"""Data that a run's evaluation or prediction cannot use, named in time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import load_config
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation import predict as prediction
from recsys.evaluation.predict import evaluate, load_run, predict
from recsys.training.train import train
from tests.datasets import FEATURE_WIDTH, write_dataset
from tests.recsys.command_runs import TINY
from tests.recsys.weighted_data import table_of


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


def test_inputs_of_unlike_columns_are_refused_before_the_model_is_loaded(
    trained: Trained, tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "load_run", not_called)
    table = table_of(trained.data, "test")
    inputs = [str(tmp_path / f"{number}.parquet") for number in range(2)]
    pq.write_table(table, inputs[0])
    pq.write_table(table.append_column("more", table["price"]), inputs[1])
    with pytest.raises(ValueError, match=r"1\.parquet: its columns differ"):
        predict(trained.run, inputs, tmp_path / "out" / "out.parquet", None, alone, "cpu")


def test_a_split_without_files_is_refused_before_the_model_is_loaded(
    trained: Trained, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "load_run", not_called)
    with pytest.raises(ValueError, match=r"data/holdout: no \*\.parquet files.*--split"):
        evaluate(trained.run, None, "holdout", alone, "cpu")
