"""Runs that are evaluated with other data: items of later on, and data that is refused."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from recsys.build import Job
from recsys.checkpoint.run_folder import trained_counts
from recsys.config import load_config
from recsys.data.prepare import prepare_vocabularies
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation import predict as prediction
from recsys.evaluation.predict import evaluate, load_run, predict
from recsys.training.train import train
from tests.datasets import FEATURE_WIDTH, write_dataset
from tests.recsys.checkpoint.schema_runs import rewrite, write_data
from tests.recsys.checkpoint.warm_start.warm_runs import config_of, full_tensor, ids_of
from tests.recsys.command_runs import TINY
from tests.recsys.weighted_data import table_of

ARGV = ["--embedding.tables", "{item: {new_rows: mean}}"]
NEVER_RANKED, LATER = 28, 901  # raw ids


def without(item: int, table: pa.Table) -> pa.Table:
    """The rows that neither rank an item nor have it in the history."""
    histories = table["history"].to_pylist()
    has_no_item = [
        ranked != item and item not in (history or [])
        for ranked, history in zip(table["item"].to_pylist(), histories, strict=True)
    ]
    return table.filter(pa.array(has_no_item))


def with_later_item(items: pa.Table) -> pa.Table:
    """The items and one more, with the content of another."""
    index = items.column_names.index("item")
    extra = items.slice(3, 1).set_column(index, "item", pa.array([LATER], pa.int64()))
    return pa.concat_tables([items, extra])


def item_table(job: Job) -> Tensor:
    return full_tensor(job.model.state_dict()["embeddings.embeddings.item.weight"])


@pytest.mark.long
def test_items_without_training_have_the_mean_of_the_trained_rows(tmp_path: Path) -> None:
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    rewrite(data / "train", lambda table: without(NEVER_RANKED, table))
    with joined_ranks("cpu") as ranks:
        config = config_of(tmp_path, *ARGV, "--epochs", "1")
        train(config, str(data), run, ranks)
        counts = trained_counts(run, 40).of(np.arange(40))
        never = ids_of(data).index(NEVER_RANKED)
        table = item_table(load_run(run, None, ranks, "cpu"))
        assert counts[never] == 0
        assert (table[never] == table[38]).all()  # of unknown ids, and the mean
        assert (table[39] == table[38]).all()
        assert not (table[counts > 0] == table[38]).all(dim=1).any()

        rewrite(data / "items", with_later_item)
        prepare_vocabularies(str(data))
        later = ids_of(data).index(LATER)
        assert (item_table(load_run(run, str(data), ranks, "cpu"))[later] == table[never]).all()


class Trained(NamedTuple):
    data: Path
    run: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose items have stored features alone."""
    folder = tmp_path_factory.mktemp("refused")
    data = write_dataset(folder / "data")
    argv = ["--content.modalities", "{clip: {kind: feature, column: clip}}", "--batch_size", "16"]
    argv += ["--best_model_by", "auc", "--cache", str(folder / "cache")]
    with joined_ranks("cpu") as ranks:
        train(load_config(TINY, argv), str(data), folder / "run", ranks)
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
    index = items.column_names.index("clip")
    pq.write_table(items.set_column(index, "clip", pa.array(wide, items["clip"].type)), file)


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
