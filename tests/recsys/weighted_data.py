"""Copies of the small dataset with integer weights, and with rows repeated as often instead."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.datasets import write_dataset

SPLITS = ("train", "valid", "test")


def table_of(data: Path, split: str) -> pa.Table:
    return pq.read_table(data / split)


def write_split(data: Path, split: str, table: pa.Table) -> None:
    """Replaces the files of a split by one."""
    for file in (data / split).glob("*.parquet"):
        file.unlink()
    pq.write_table(table, data / split / "part-0.parquet", row_group_size=11)


def change_columns(data: Path, **columns: dict[str, object] | None) -> None:
    """Sets columns of schema.yaml; None removes one."""
    file = data / "schema.yaml"
    schema = yaml.safe_load(file.read_text())
    schema["columns"] |= columns
    schema["columns"] = {
        name: column for name, column in schema["columns"].items() if column is not None
    }
    file.write_text(yaml.safe_dump(schema, sort_keys=False))


def write_weighted(folder: Path) -> tuple[Path, Path]:
    """The dataset with a column of weights 0 to 3, and with its rows repeated instead."""
    weighted, repeated = folder / "weighted", folder / "repeated"
    for data in (weighted, repeated):
        write_dataset(data)
        for number, split in enumerate(SPLITS):
            table = table_of(data, split)
            times = np.random.default_rng(number).integers(0, 4, table.num_rows)
            if data == repeated:
                table = table.take(np.repeat(np.arange(table.num_rows), times))
            else:
                table = table.append_column("times", pa.array(times, pa.int32()))
            write_split(data, split, table)
    change_columns(weighted, times={"kind": "weight"})
    return weighted, repeated


def write_null_labels(data: Path) -> Path:
    """The dataset with a second label that is null in some rows."""
    write_dataset(data)
    for number, split in enumerate(SPLITS):
        table = table_of(data, split)
        rng = np.random.default_rng(number)
        bought = rng.integers(0, 2, table.num_rows).astype(np.float32)
        labels = pa.array(bought, mask=rng.random(table.num_rows) < 0.4)
        write_split(data, split, table.append_column("bought", labels))
    change_columns(data, bought={"kind": "label", "nullable": True})
    return data
