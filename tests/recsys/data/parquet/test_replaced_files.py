"""A file in the place of another, of equal name, rows and bytes, is noticed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.checkpoint.compatibility import check_equal
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset


def replace_values(root: Location, column: str) -> None:
    """Other values in the first training file, none encoded longer or shorter than before."""
    file = root / "train/part-0.parquet"
    with file.filesystem.open(file.path, "rb") as opened:
        table = pq.read_table(opened)
    values = 1 - table[column].to_numpy()
    table = table.set_column(table.column_names.index(column), column, pa.array(values))
    write(table, file)


def write(table: pa.Table, file: Location) -> None:
    with file.filesystem.open(file.path, "wb") as opened:
        pq.write_table(table, opened, row_group_size=11, compression="none", use_dictionary=False)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    write_dataset(tmp_path / "data")
    for file in (tmp_path / "data" / "train").glob("*.parquet"):
        write(pq.read_table(file), Location.of(file))
    if request.param == "local":
        return Location.of(tmp_path / "data")
    root = Location.of(f"memory://replaced-{tmp_path.name}")
    root.filesystem.put(f"{tmp_path}/data", root.path, recursive=True)
    return root


def rows_of(root: Location) -> ParquetRows:
    return ParquetRows.of_split(root, "train", load_schema(root))


def test_other_values_of_equal_size_have_another_fingerprint(root: Location) -> None:
    before = rows_of(root)
    again = rows_of(root).fingerprint()
    replace_values(root, "price")
    after = rows_of(root)
    assert [group.num_bytes for group in after.chunks] == [g.num_bytes for g in before.chunks]
    assert before.fingerprint() == again != after.fingerprint()
    with pytest.raises(ValueError, match="training data"):
        check_equal("the training data", again, after.fingerprint(), "step-1")


def test_a_file_replaced_while_it_is_in_use_is_refused_by_name(root: Location) -> None:
    rows = rows_of(root)
    assert next(rows.read(0, 60)).num_rows == 60
    replace_values(root, "price")
    with pytest.raises(ValueError, match=r"train/part-0\.parquet"):
        next(rows.read(0, 60))
    assert np.isfinite(next(rows.read(30, 60))["price"].to_numpy()).all()  # the other file
