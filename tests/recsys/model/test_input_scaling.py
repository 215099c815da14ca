"""Numbers of wide range get mean 0 and variance 1 of the training rows; all others stay as bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.build import build_job
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import load_config
from recsys.data.batch import Batch, ExtraHistory
from recsys.data.batch_builder import BatchBuilder
from recsys.data.item_frequency import NumberRange, NumberRanges
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import Column, Schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import check_data
from recsys.evaluation.predict import load_run
from recsys.model.inputs import InputScaling
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY
from tests.recsys.em3_runs import em3_config, ranks_of

WITHOUT_CONTENT = ["--content", "none", "--contrastive.weight", "0", "--device", "cpu"]


def range_of(*values: float) -> NumberRange:
    number_range = NumberRange()
    number_range.add(np.array(values, np.float32))
    return number_range


def batch_of(dense: list[list[float]], values: list[list[float]]) -> Batch:
    """A batch of one row with a history, and with a further one of the same events."""
    columns = {"item": Column("id", num_embeddings=9), "liked": Column("label")}
    rows = pa.table({"item": [7], "liked": pa.array([1], pa.float32()), ROW_POSITION: [0]})
    lists = torch.tensor(values)
    extra_history = ExtraHistory(torch.tensor([len(values)]), lists, len(values), torch.zeros(0))
    batch = BatchBuilder(Schema("item", "item", columns), [])(rows)
    history = replace(batch.history, values=lists, extras=[extra_history])
    return replace(batch, dense_features=torch.tensor(dense), history=history)


def test_wide_numbers_are_standardized_and_others_stay_to_the_last_bit() -> None:
    scaling = InputScaling(["count", "share"], [["seconds"], ["price"]])
    numbers = {
        "count": range_of(0, 10, 20, 30, 340),
        "share": range_of(-3, 3),
        "seconds": range_of(0, 4),
        "price": range_of(0, 1),
    }
    scaling.fit(numbers)
    scaled = scaling(batch_of([[340.0, 0.1]], [[0.0], [4.0], [1.7]]))
    counts = np.array([0, 10, 20, 30, 340])
    assert scaled.dense_features[0, 0].item() == pytest.approx((340 - counts.mean()) / counts.std())
    assert torch.equal(scaled.dense_features[0, 1], torch.tensor(0.1))
    torch.testing.assert_close(scaled.history.values, torch.tensor([[-1.0], [1.0], [-0.15]]))
    assert torch.equal(scaled.history.recorded_values, torch.tensor([[0.0], [4.0], [1.7]]))
    assert torch.equal(scaled.history.extras[0].values, torch.tensor([[0.0], [4.0], [1.7]]))


def test_far_outliers_are_clamped() -> None:
    scaling = InputScaling(["count"], [[], []])
    scaling.fit({"count": range_of(0, 4)})
    assert scaling(batch_of([[3e38]], [[1.0]])).dense_features.item() == 8.0


def test_a_constant_of_any_size_becomes_0() -> None:
    scaling = InputScaling(["year"], [[], []])
    scaling.fit({"year": range_of(2026, 2026)})
    assert scaling(batch_of([[2026.0]], [[1.0]])).dense_features.item() == 0.0


def test_later_rows_move_mean_and_deviation_to_those_of_all_rows() -> None:
    scaling, ranges = InputScaling(["count"], []), [range_of(0, 10), range_of(20, 40)]
    for number_range in ranges:
        scaling.fit({"count": number_range})
    everything = np.array([0, 10, 20, 40])
    assert scaling.mean.item() == pytest.approx(everything.mean())
    assert scaling.deviation.item() == pytest.approx(everything.std())
    scaling.fit({"count": range_of(0, 1)})  # no longer wide
    assert scaling.is_scaled.item() and scaling.mean.item() < everything.mean()


def test_ranges_are_those_of_the_rows_of_all_ranks(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    ranges = run_on_ranks(ranges_on, 2, tmp_path)
    assert ranges[0] == ranges[1]
    with joined_ranks("cpu") as ranks:
        job = build_job(em3_config(tmp_path), str(tmp_path / "data"), ranks)
        all_ranges = NumberRanges(job.schema)
        for table in job.rows("train").read(0, 60):
            all_ranges.add(table)
    for name, rows in all_ranges.by_column.items():
        assert vars(ranges[0][name]) == pytest.approx(vars(rows))


def ranges_on(rank: int, world_size: int, folder: Path) -> dict[str, NumberRange]:
    ranks = ranks_of(rank, world_size)
    job = build_job(em3_config(folder), str(folder / "data"), ranks)
    return check_data(job).numbers


@pytest.fixture(scope="module")
def previous_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that reads its numbers as they are, prices up to 40."""
    folder = tmp_path_factory.mktemp("before")
    write_dataset(folder / "data")
    widen(folder / "data")
    run_on(folder, "run", "--ranking.scale_inputs", "false", "--batch_size", "64")
    return folder


def widen(data: Path) -> None:
    for file in data.glob("t*/*.parquet"):
        table = pq.read_table(file)
        index = table.column_names.index("price")
        prices = pa.array(table["price"].to_numpy() * 40, pa.float32())
        pq.write_table(table.set_column(index, "price", prices), file)


def run_on(folder: Path, out: str, *argv: str, warm_start: Path | None = None) -> None:
    request = None if warm_start is None else WarmStart(warm_start)
    with joined_ranks("cpu") as ranks:
        config = load_config(TINY, [*WITHOUT_CONTENT, *argv])
        train(config, str(folder / "data"), folder / out, ranks, warm_start=request)


def scaling_of(run: Path) -> InputScaling:
    with joined_ranks("cpu") as ranks:
        scaling = load_run(run, None, ranks, "cpu").em3.scaling
    assert scaling is not None
    return scaling


def test_a_run_that_begins_with_a_model_of_raw_numbers_reads_them_as_they_are(
    previous_run: Path,
) -> None:
    run_on(previous_run, "begun", "--batch_size", "64", warm_start=previous_run / "run")
    assert not scaling_of(previous_run / "begun").is_scaled.any()
    run_on(previous_run, "next", "--batch_size", "64", warm_start=previous_run / "begun")
    assert not scaling_of(previous_run / "next").is_scaled.any()


def test_a_new_run_standardizes_and_one_that_begins_with_it_goes_on(previous_run: Path) -> None:
    run_on(previous_run, "new", "--batch_size", "64")
    scaling = scaling_of(previous_run / "new")
    assert scaling.is_scaled.tolist() == [True, False]  # price, history_liked
    run_on(previous_run, "after", "--batch_size", "64", warm_start=previous_run / "new")
    following = scaling_of(previous_run / "after")
    assert float(following.fits) == 2 and following.is_scaled.tolist() == [True, False]
    torch.testing.assert_close(following.mean, scaling.mean)
    with pytest.raises(ValueError, match=r"ranking\.scale_inputs"):
        run_on(previous_run, "new", "--epochs", "2", "--ranking.scale_inputs", "false")
