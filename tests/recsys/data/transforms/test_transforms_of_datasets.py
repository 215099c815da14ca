"""Fitted values belong to the dataset and to the runs that were trained with them."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.checkpoint.run_schema import load_run_schema, schema_of_data, write_run_schema
from recsys.config import Config
from recsys.data.parquet.rows import ParquetRows
from recsys.data.prepare import format_fitted, prepare_transforms
from recsys.data.schema import Schema, load_schema, read_schema
from recsys.data.transforms.columns import read_columns
from recsys.distributed.ranks import joined_ranks
from recsys.storage.location import Location
from recsys.training.train import train

COLUMNS = """\
target_item: item
group: user
columns:
  user:   {kind: id, num_embeddings: 3}
  item:   {kind: id, num_embeddings: 3}
  price:  {kind: dense, transform: [{fill: 0}, log1p, standardize]}
  bucket: {kind: id, num_embeddings: 4, column: cost, transform: [{bucketize: {quantiles: 4}}]}
  liked:  {kind: label}
"""
RANKS: Any = SimpleNamespace(is_first=True)


def write(folder: Path, text: str = COLUMNS, **replaced: Any) -> Location:
    columns = {"price": [1.0, 3.0, None, 7.0], "cost": [1, 2, 3, 4]}
    rows = {name: [0, 1, 2, 0] for name in ("user", "item")} | columns | {"liked": [0, 1, 0, 1]}
    for split in ("train", "valid", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows | replaced), folder / split / "part-0.parquet")
    (folder / "schema.yaml").write_text(text)
    return Location.of(folder)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    write(folder / "data")
    prepare_transforms(str(folder / "data"))
    return folder / "data"


@pytest.fixture
def data(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted, tmp_path / "data"))


def run_of(schema: Schema, folder: Path) -> Path:
    folder.mkdir()
    write_run_schema(folder, schema)
    return folder


def test_training_asks_for_the_command_that_fits_before_anything_is_written(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    command = f"(?s)'price', 'bucket'.*recsys prepare transforms --data {root}"
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=command):
        train(Config(), str(root), tmp_path / "run", ranks)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_fitted_values_are_stored_beside_the_schema_and_shown(data: Path) -> None:
    stored = yaml.safe_load((data / "transforms.yaml").read_text())
    assert stored["bucket"]["transform"] == [
        {"bucketize": {"boundaries": [1.75, 2.5, 3.25], "quantiles": 4}}
    ]
    chains = load_schema(Location.of(data)).transforms
    assert "bucket: bucketize: boundaries [1.75, 2.5, 3.25]" in format_fitted(chains)
    assert chains["price"].steps[2].settings["mean"] == pytest.approx(1.5 * math.log(2))


def test_a_change_of_the_schema_asks_for_another_fit(data: Path) -> None:
    for old, new in [("fill: 0", "fill: 1"), ("column: cost", "column: price")]:
        (data / "schema.yaml").write_text(COLUMNS.replace(old, new))
        with pytest.raises(ValueError, match=r"transforms.yaml.*recsys prepare transforms"):
            load_schema(Location.of(data))
    assert prepare_transforms(str(data))["bucket"].sources == ("price",)
    load_schema(Location.of(data))


@pytest.mark.parametrize("text", ["[", "[1]", "price: 3", "price: {column: [price], steps: 1}"])
def test_a_damaged_file_is_named(data: Path, text: str) -> None:
    (data / "transforms.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"transforms.yaml: damaged"):
        load_schema(Location.of(data))


def test_a_run_keeps_its_fitted_values_and_refuses_others_by_name(
    data: Path, tmp_path: Path
) -> None:
    schema = load_schema(Location.of(data))
    run = run_of(schema, tmp_path / "run")
    run_schema = load_run_schema(run)
    assert run_schema is not None and run_schema.transforms == schema.transforms
    assert (
        schema_of_data(run, Location.of(data), RANKS, is_resumed=True).transforms
        == run_schema.transforms
    )

    write(data, cost=[1, 2, 3, 40])
    prepare_transforms(str(data))
    with pytest.raises(ValueError, match=r"column 'bucket' transform.0.bucketize.boundaries \(run"):
        schema_of_data(run, Location.of(data), RANKS)


def test_data_without_fitted_values_takes_those_of_the_run(data: Path, tmp_path: Path) -> None:
    schema = load_schema(Location.of(data))
    run = run_of(schema, tmp_path / "run")
    (data / "transforms.yaml").unlink()
    assert schema_of_data(run, Location.of(data), RANKS).transforms == schema.transforms

    (data / "schema.yaml").write_text(COLUMNS.replace("fill: 0", "fill: 1"))
    with pytest.raises(
        ValueError, match=r"column 'price' transform.0.fill.value \(run: 0, data: 1"
    ):
        schema_of_data(run, Location.of(data), RANKS)


def test_what_a_step_has_made_of_a_bad_row_is_named_with_file_and_row(data: Path) -> None:
    write(data, price=[1.0, 2.0, -1.5, 0.0])
    root = Location.of(data)
    rows = ParquetRows.of_split(root, "train", load_schema(root))
    with pytest.raises(ValueError, match=r"train/part-0.parquet: column 'price', row 2: .*null"):
        rows.read_chunk(0)


@pytest.mark.parametrize(
    "keys", ["transform: [{fill: '2026-03-01'}, {hour: Asia/Tokyo}]", "fill: '2026-03-01', zone"]
)
def test_times_are_filled_by_a_time_in_files_as_in_requests(tmp_path: Path, keys: str) -> None:
    """A date would be one of UTC in times, but of the zone where a request has null."""
    keys = keys.replace("zone", "transform: [{hour: Asia/Tokyo}]")
    text = COLUMNS.replace("  liked", f"  when: {{kind: id, num_embeddings: 24, {keys}}}\n  liked")
    times = pa.array([None, 0, None, 3600], pa.timestamp("s"))
    data = write(tmp_path, text.replace("2026-03-01", "2026-03-01T00:00"), when=times)
    prepare_transforms(str(tmp_path))
    schema = load_schema(data)
    rows = ParquetRows.of_split(data, "train", schema)
    assert rows.read_chunk(0)["when"].to_pylist() == [9, 9, 9, 10]
    null = read_columns(pa.table({"when": pa.nulls(1)}), schema, ["when"], "user")["when"]
    assert null.to_pylist() == [9]
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(ValueError, match="fill '2026-03-01' is a date, and the column has times"):
        ParquetRows.of_split(data, "train", read_schema(data))
