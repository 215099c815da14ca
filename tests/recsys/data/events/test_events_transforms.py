"""Transforms of prepared datasets, and the DuckDB engine that makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events import parquet_parts
from recsys.data.events.load import load_events_config
from recsys.data.events.prepare import prepare_events
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location

START, ROWS = 1_790_000_000, 60
TRANSFORMS: dict[str, Any] = {
    "price": {"kind": "dense", "transform": ["log1p", "standardize"]},
    "shop_hour": {
        "kind": "id",
        "num_embeddings": 50,
        "column": ["shop", "hour"],
        "transform": ["cross"],
        "vocabulary": {"kind": "hash"},
    },
    "weight": {"kind": "dense", "transform": ["standardize"]},
    "sold": {"kind": "dense", "transform": [{"clip": {"low": 1}}, "log1p"]},
    "hour": {
        "kind": "id",
        "num_embeddings": 24,
        "column": "time",
        "transform": [{"hour": {"unit": "us"}}],
    },
}


def write(folder: Path, transforms: dict[str, Any]) -> Path:
    log = {
        "user": [number % 6 for number in range(ROWS)],
        "item": [number % 7 for number in range(ROWS)],
        "time": [START + 3600 * number for number in range(ROWS)],
        "price": [float(number) for number in range(ROWS)],
        "shop": ["north", "south"] * (ROWS // 2),
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    weights = {"id": range(7), "weight": [float(item) for item in range(7)]}
    pq.write_table(pa.table(weights), folder / "items.parquet")
    content = {
        "events": {"buy": {"path": "log.parquet", "columns": ["price", "shop"]}},
        "items": {"path": "items.parquet", "columns": {"weight": "dense"}},
        "context": {"price": "dense", "shop": "id"},
        "labels": {"bought": {"action": "buy"}},
        "counts": {"sold": {"of": "item"}},
        "transforms": transforms,
    }
    (folder / "events.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "events.yaml"


def test_a_dataset_has_its_transforms_fitted(tmp_path: Path) -> None:
    prepare_events(write(tmp_path, TRANSFORMS), tmp_path / "out")
    root = Location.of(tmp_path / "out")
    schema = load_schema(root)
    rows = ParquetRows.of_split(root, "train", schema)
    [table] = rows.read(0, rows.num_rows)
    prices = np.log1p(pq.read_table(tmp_path / "out" / "train")["price"].to_numpy())
    expected = (prices - prices.mean()) / prices.std()
    np.testing.assert_allclose(table["price"], expected, rtol=1e-5, atol=1e-5)
    weights = pq.read_table(tmp_path / "out" / "train")["weight"].to_numpy()
    expected = (weights - weights.mean()) / weights.std()
    np.testing.assert_allclose(table["weight"], expected, rtol=1e-5, atol=1e-5)
    counts = pq.read_table(tmp_path / "out" / "train")["sold"].to_numpy()
    assert counts.min() == 0
    np.testing.assert_allclose(table["sold"], np.log1p(counts.clip(1)), rtol=1e-5)
    first = START // 3600
    assert table["hour"].to_pylist() == [(first + row) % 24 for row in range(len(table))]
    assert len(set(table["shop_hour"].to_pylist())) > 15


@pytest.mark.parametrize(
    ("name", "change", "pattern"),
    [
        ("hour", {"column": "tim"}, "'tim'"),
        ("shop_hour", {"vocabulary": {"kind": "exact"}}, "'shop_hour'.*exact"),
        ("hour", {"column": "bought"}, "'hour' reads 'bought'"),
        ("other", {"kind": "dense"}, "'other'.*transform"),
    ],
)
def test_what_they_cannot_mean_is_named_before_a_log_is_read(
    tmp_path: Path, name: str, change: dict[str, Any], pattern: str
) -> None:
    transforms = {**TRANSFORMS, name: TRANSFORMS.get(name, {}) | change}
    with pytest.raises(ValueError, match=rf"events.yaml: .*{pattern}"):
        load_events_config(write(tmp_path, transforms))


def doubled(rows: pa.RecordBatch) -> pa.RecordBatch:
    return rows.append_column("twice", pa.array(2 * rows["number"].to_numpy()))


def test_rows_of_several_files_are_completed_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_parts, "BYTES_PER_PART", 1000)
    numbers, constant = np.arange(1000), np.zeros(1000, np.float32)
    table = pa.table(
        {"number": numbers, "noise": np.sqrt(numbers, dtype=np.float32), "same": constant}
    )

    batches = table.to_batches(max_chunksize=70)
    rows = parquet_parts.write_parts(batches, tmp_path / "split", 50, 3, doubled)

    files = sorted((tmp_path / "split").iterdir())
    assert rows == 1000 and len(files) > 5
    read = pa.concat_tables(map(pq.read_table, files))
    assert read.equals(table.append_column("twice", pa.array(2 * numbers)))
    with pq.ParquetFile(files[0]) as file:
        group = file.metadata.row_group(0)
        assert group.num_rows == 50
        has = [group.column(column).has_dictionary_page for column in range(4)]
    assert (read.column_names, has) == (
        ["number", "noise", "same", "twice"],
        [False, False, True, False],
    )


def test_an_error_in_a_file_that_is_written_ends_the_writing(tmp_path: Path) -> None:
    def refuse(rows: pa.RecordBatch) -> pa.RecordBatch:
        raise ValueError(f"{rows.num_rows} rows")

    batches = pa.table({"number": np.arange(10)}).to_batches()
    with pytest.raises(ValueError, match="10 rows"):
        parquet_parts.write_parts(batches, tmp_path / "split", 50, 2, refuse)
