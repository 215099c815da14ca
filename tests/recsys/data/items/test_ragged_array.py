"""Rows of varying length on disk against a list of lists, and every way to gather them."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from recsys.data.items import ragged_array
from recsys.data.items.ragged_array import RaggedArray, RaggedWriter, RowWriter, share_rows


def write(folder: Path, rows: list[list[int]]) -> RaggedArray:
    values = np.array([value for row in rows for value in row], np.int64)
    return written(folder, np.array([len(row) for row in rows]), values)


def written(folder: Path, lengths: np.ndarray, values: np.ndarray) -> RaggedArray:
    with closing(RaggedWriter(folder, values.shape[1:], values.dtype.name)) as writer:
        writer.add(lengths, values)
    return RaggedArray(folder)


def test_gathered_rows_are_padded_to_the_longest_of_them(tmp_path: Path) -> None:
    array = write(tmp_path, [[1, 2, 3, 4], [5], [], [6, 7]])
    values, mask = array.gather(np.array([3, 1, 2, 3]))
    assert values.tolist() == [[6, 7], [5, 0], [0, 0], [6, 7]]
    assert mask.tolist() == [[True, True], [True, False], [False, False], [True, True]]
    assert (len(array), array.lengths.tolist()) == (4, [4, 1, 0, 2])


def test_rows_may_share_their_entries(tmp_path: Path) -> None:
    write(tmp_path, [[8], [9, 9]])
    share_rows(tmp_path, np.array([1, -1, 0, 1]))
    array = RaggedArray(tmp_path)
    assert (len(array), array.lengths.tolist()) == (4, [2, 0, 1, 2])
    values, mask = array.gather(np.array([3, 2, 1, -1]))
    assert values.tolist() == [[9, 9], [8, 0], [0, 0], [0, 0]]
    assert mask.tolist() == [[True, True], [True, False], [False, False], [False, False]]
    share_rows(tmp_path, np.array([2]))
    with pytest.raises(ValueError, match="damaged"):
        RaggedArray(tmp_path)


def mapped_bytes(file: Path) -> int:
    """How much of a file counts as memory of this process."""
    total, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            is_of_file = line.endswith(str(file))
        elif is_of_file and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def test_what_is_mapped_of_a_large_array_stays_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.full(2000, 4)

    def most_mapped(folder: Path) -> int:
        with closing(RowWriter(folder, lengths, (1024,), "float32")) as writer:
            for row in range(2000):
                writer.write(np.array([row]), np.full((4, 1024), row, np.float32))
        assert mapped_bytes(folder / "values.npy") < 2**18  # its header
        array, most = RaggedArray(folder), 0
        for row in range(2000):
            assert (array.gather(np.array([row]))[0] == row).all()
            if row % 100 == 0:
                most = max(most, mapped_bytes(folder / "values.npy"))
        return most

    assert most_mapped(tmp_path / "small") > 28 * 2**20  # nearly the whole file of 31 MiB
    monkeypatch.setattr(ragged_array, "RESIDENT_BYTES", 4 * 2**20)
    assert most_mapped(tmp_path / "large") < 5 * 2**20


def test_rows_are_written_in_any_order(tmp_path: Path) -> None:
    with closing(RowWriter(tmp_path, np.array([1, 0, 2, 1]), (2,), "float32")) as writer:
        writer.write(np.array([2, 1, 0]), np.array([[5, 6], [7, 8], [1, 2]]))
        writer.write(np.array([3]), np.array([[9, 9]]))
    values, mask = RaggedArray(tmp_path).gather(np.arange(4))
    assert mask.tolist() == [[True, False], [False, False], [True, True], [True, False]]
    assert values.tolist() == [
        [[1, 2], [0, 0]],
        [[0, 0], [0, 0]],
        [[5, 6], [7, 8]],
        [[9, 9], [0, 0]],
    ]
