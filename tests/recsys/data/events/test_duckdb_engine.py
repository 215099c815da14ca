"""DuckDB as an engine: its settings, and files that are written several at a time, in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.events import sql


def doubled(rows: pa.RecordBatch) -> pa.RecordBatch:
    return rows.append_column("twice", pa.array(2 * rows["number"].to_numpy()))


def test_rows_of_several_files_are_completed_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql, "BYTES_PER_PART", 1000)
    numbers, constant = np.arange(1000), np.zeros(1000, np.float32)
    table = pa.table(
        {"number": numbers, "noise": np.sqrt(numbers, dtype=np.float32), "same": constant}
    )

    batches = table.to_batches(max_chunksize=70)
    rows = sql.write_parts(batches, tmp_path / "split", 50, 3, doubled)

    files = sorted((tmp_path / "split").iterdir())
    assert rows == 1000 and len(files) > 5
    read = pa.concat_tables(map(pq.read_table, files))
    assert read.equals(table.append_column("twice", pa.array(2 * numbers)))
    with pq.ParquetFile(files[0]) as file:
        group = file.metadata.row_group(0)
        assert group.num_rows == 50
        has = [group.column(place).has_dictionary_page for place in range(4)]
    assert (read.column_names, has) == (
        ["number", "noise", "same", "twice"],
        [False, False, True, False],
    )


def test_an_error_in_a_file_that_is_written_ends_the_writing(tmp_path: Path) -> None:
    def refuse(rows: pa.RecordBatch) -> pa.RecordBatch:
        raise ValueError(f"{rows.num_rows} rows")

    batches = pa.table({"number": np.arange(10)}).to_batches()
    with pytest.raises(ValueError, match="10 rows"):
        sql.write_parts(batches, tmp_path / "split", 50, 2, refuse)
