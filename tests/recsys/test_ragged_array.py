"""Rows of varying length on disk against a list of lists."""

from pathlib import Path

import numpy as np

from recsys.data.ragged_array import RaggedArray


def write(folder: Path, rows: list[list[int]]) -> RaggedArray:
    array = RaggedArray.create(folder, np.array([len(row) for row in rows]), (), "int64")
    array.values[: sum(map(len, rows))] = np.array([value for row in rows for value in row])
    array.values.flush()
    return RaggedArray(folder)


def test_gathered_rows_are_padded_to_the_longest_of_them(tmp_path: Path) -> None:
    array = write(tmp_path, [[1, 2, 3, 4], [5], [], [6, 7]])
    values, mask = array.gather(np.array([3, 1, 2, 3]))
    assert values.tolist() == [[6, 7], [5, 0], [0, 0], [6, 7]]
    assert mask.tolist() == [[True, True], [True, False], [False, False], [True, True]]
    assert (len(array), array.lengths.tolist()) == (4, [4, 1, 0, 2])


def test_an_unknown_row_has_no_entry_and_zero_values(tmp_path: Path) -> None:
    values, mask = write(tmp_path, [[8], [9, 9]]).gather(np.array([-1, 0]))
    assert values.tolist() == [[0], [8]]
    assert mask.tolist() == [[False], [True]]


def test_no_rows_and_only_empty_rows_have_width_one(tmp_path: Path) -> None:
    array = write(tmp_path / "a", [[8], []])
    values, mask = array.gather(np.zeros(0, np.int64))
    assert values.shape == mask.shape == (0, 1)
    values, mask = write(tmp_path / "b", [[], []]).gather(np.array([0, 1]))
    assert values.tolist() == [[0], [0]]
    assert not mask.any()


def test_entries_may_have_a_shape_and_a_type(tmp_path: Path) -> None:
    array = RaggedArray.create(tmp_path, np.array([1, 0, 2]), (3, 2, 2), "uint8")
    array.values[:] = np.arange(36, dtype=np.uint8).reshape(3, 3, 2, 2)
    array.values.flush()
    values, mask = RaggedArray(tmp_path).gather(np.array([2, 1]))
    assert (values.shape, values.dtype) == ((2, 2, 3, 2, 2), np.uint8)
    assert values[0].ravel().tolist() == list(range(12, 36))
    assert not values[1].any()
    assert mask.tolist() == [[True, True], [False, False]]


def test_what_is_gathered_is_a_copy_that_may_be_changed(tmp_path: Path) -> None:
    array = write(tmp_path, [[1], [2]])
    values, _ = array.gather(np.array([0]))
    values[:] = 7
    assert array.gather(np.array([0]))[0].tolist() == [[1]]
