"""Moments of rows and items: times and numbers of one unit; what cannot be compared is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.parquet.moments import moments_of, row_moments, time_unit
from recsys.storage.location import Location


def test_the_unit_of_times_is_told_by_their_size() -> None:
    units = [time_unit(np.array([0, np.nan, time, time])) for time in (1.8e9, 1.8e12, 1.8e15, 7.0)]
    assert units == ["s", "ms", "us", None]


def test_moments_in_nanoseconds_may_be_integers() -> None:
    moments = pa.array([1_764_000_000_000_000_000, None])
    numbers, are_times = moments_of([(Location.of("part.parquet"), moments)], "since")
    assert numbers[0] == 1.764e18 and np.isnan(numbers[1]) and not are_times


def test_files_whose_moments_are_times_and_numbers_are_refused_but_nulls_are_neither() -> None:
    first, second, third = map(Location.of, ("first.parquet", "second.parquet", "third.parquet"))
    times = pa.array([1_704_110_400_000_000], pa.timestamp("us"))
    chunks = [(first, pa.nulls(1)), (second, times)]
    numbers, are_times = moments_of(chunks, "since")
    assert np.isnan(numbers[0]) and numbers[1] == 1_704_110_400_000_000 and are_times
    assert moments_of(chunks[:1], "since")[1] is None
    with pytest.raises(ValueError, match=r"third.*has type int64, but in .*second.* has times;"):
        moments_of([*chunks, (third, pa.array([1_704_110_400]))], "since")


def test_files_whose_moments_are_numbers_in_two_units_are_refused() -> None:
    first, second = map(Location.of, ("first.parquet", "second.parquet"))
    seconds, millis = pa.array([1_704_110_400, None]), pa.array([1_704_110_400_000])
    assert len(moments_of([(first, seconds), (second, seconds)], "since")[0]) == 4
    with pytest.raises(ValueError, match=r"second.*in ms since 1970, but in .*first.* in s;"):
        moments_of([(first, seconds), (second, millis)], "since")


def test_a_damaged_file_of_moments_is_named(tmp_path: Path) -> None:
    file = tmp_path / "part.parquet"
    pq.write_table(pa.table({"time": [1, 2]}), file, use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[4:16] = b"\xff" * 12  # the header of the first page
    file.write_bytes(content)
    rows: Any = SimpleNamespace(row_groups=[SimpleNamespace(file=Location.of(str(file)))])
    with pytest.raises(ValueError, match=f"{file}: row group 0 cannot be read"):
        row_moments(rows, "time")
