"""Exact and hashed vocabularies, over any ids that a data set may hold."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import embeddings.vocabulary.fixed as vocabulary_module
from embeddings.vocabulary.fixed import (
    FEW_IDS,
    ExactVocabulary,
    HashVocabulary,
    integer_ids,
    mix64,
)

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
integers = st.integers(INT64_MIN, INT64_MAX) | st.sampled_from([0, -1, INT64_MIN, INT64_MAX])
strings = st.text(max_size=8) | st.sampled_from(["", "0", " ", "é", "\x00", "\x00\x00"])


def array(ids: list[int] | list[str]) -> pa.Array:
    return pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64())


def vocabulary_of(*chunks: list[int] | list[str], num_embeddings: int = 1000) -> ExactVocabulary:
    vocabulary = ExactVocabulary(num_embeddings)
    vocabulary.extend(array(chunk) for chunk in chunks)
    return vocabulary


lists_of_ids = st.lists(integers, max_size=20) | st.lists(strings, max_size=20)
two_lists_of_ids = st.tuples(st.lists(integers), st.lists(integers)) | st.tuples(
    st.lists(strings), st.lists(strings)
)


@given(lists_of_ids)
def test_ids_get_rows_from_zero_in_the_order_they_came(ids: list[int] | list[str]) -> None:
    vocabulary = vocabulary_of(ids)
    in_order = list(dict.fromkeys(ids))
    assert len(vocabulary) == len(in_order)
    assert vocabulary.rows_of(array(ids)).tolist() == [in_order.index(item) for item in ids]


@given(two_lists_of_ids)
def test_ids_not_in_the_map_have_the_last_row(lists: tuple[list[int], list[int]]) -> None:
    first, second = lists
    vocabulary = vocabulary_of(first)
    rows = vocabulary.rows_of(array(second))
    assert [row == vocabulary.unknown_row for row in rows] == [item not in first for item in second]
    rows_found = vocabulary.find(array(second))
    assert [row == -1 for row in rows_found] == [item not in first for item in second]


@given(two_lists_of_ids)
def test_an_extension_keeps_every_row(lists: tuple[list[int], list[int]]) -> None:
    earlier, later = lists
    old, new = vocabulary_of(earlier), vocabulary_of(earlier)
    num_added = new.extend([array(later)])
    assert num_added == len({*later} - {*earlier}) == len(new) - len(old)
    assert new.rows_of(array(earlier)).tolist() == old.rows_of(array(earlier)).tolist()
    assert new.is_extension_of(old)
    assert old.is_extension_of(new) == (num_added == 0)


@given(ids=lists_of_ids)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_map_is_read_back(tmp_path: Path, ids: list[int] | list[str]) -> None:
    vocabulary, file = vocabulary_of(ids), str(tmp_path / "item.parquet")
    vocabulary.save(file)
    loaded = ExactVocabulary.load(file, num_embeddings=2000)
    assert loaded.is_extension_of(vocabulary) and vocabulary.is_extension_of(loaded)
    assert loaded.find(array(ids)).tolist() == vocabulary.find(array(ids)).tolist()
    assert loaded.unknown_row == 1999


INTEGERS = [pa.int8(), pa.uint64(), pa.dictionary(pa.int32(), pa.int16())]
STRINGS = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", INTEGERS + STRINGS)
def test_every_type_of_integer_and_string_means_the_same_ids(kind: pa.DataType) -> None:
    if kind in INTEGERS:
        ids, map_ids = pa.array([5, 6, 7], kind), [7, 5]
    else:
        ids, map_ids = pa.array(["b", "c", "a"]).cast(kind), ["a", "b"]
    assert vocabulary_of(map_ids).rows_of(ids).tolist() == [1, 999, 0]  # type: ignore[arg-type]


def test_slices_and_chunks_mean_their_own_ids() -> None:
    vocabulary = vocabulary_of([5, 6], [7, 5])
    chunks = pa.chunked_array([pa.array([0, 5, 7]).slice(1), pa.array([], pa.int64())])
    assert vocabulary.rows_of(chunks).tolist() == [0, 2]


@pytest.mark.parametrize("kind", [int, str])
def test_many_ids_have_the_rows_that_each_has_alone(kind: type) -> None:
    ids = [kind(number % 700) for number in range(2 * FEW_IDS)]
    vocabulary = ExactVocabulary(600)
    vocabulary.extend([pa.array(ids[100:690])])
    alone = [int(vocabulary.rows_of(pa.array([one]))[0]) for one in ids[:700]]
    assert len(set(alone)) == 591  # the unknown ids have one row
    assert vocabulary.rows_of(pa.array(ids)).tolist() == [alone[i % 700] for i in range(len(ids))]
    hashed = HashVocabulary(10**6)
    alone = [int(hashed.rows_of(pa.array([one]))[0, 0]) for one in ids[:700]]
    assert hashed.rows_of(pa.array(ids))[:700, 0].tolist() == alone


def test_ids_that_do_not_fit_are_refused_with_the_rows_they_need() -> None:
    vocabulary = vocabulary_of([1, 2], num_embeddings=4)
    with pytest.raises(ValueError, match=r"5 ids.* 4,.* 6"):
        vocabulary.extend([array([3, 4]), array([5])])
    assert vocabulary.rows_of(array([1, 2, 3])).tolist() == [0, 1, 3]
    assert vocabulary.extend([array([3])]) == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([1, None]), "id number 1 is null"),
        (pa.array([None, "a"]), "id number 0 is null"),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([7, None])), "1 is null"),
        (pa.array([1.0]), "type double"),
        (pa.array([True]), "type bool"),
        (pa.array([2**63], pa.uint64()), "64-bit"),
        (pa.array(["1"]), "integers.*large_string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ids_of_another_kind_are_refused(ids: pa.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocabulary_of([1, 7]).rows_of(ids)


def test_a_table_without_room_for_known_and_unknown_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="num_embeddings is 1"):
        ExactVocabulary(1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [5, 6], "row": [0, 2]}, "0, 1, 2"),
        ({"id": [5, 5], "row": [0, 1]}, "several rows"),
        ({"id": [5, None], "row": [0, 1]}, "id number 1 is null"),
        ({"id": [5, 6, 7], "row": [2, 1, 0]}, "3 ids"),
        ({"id": [5]}, "vocabulary"),
    ],
)
def test_a_file_that_is_no_map_is_named(
    tmp_path: Path, columns: dict[str, list[int]], message: str
) -> None:
    file = str(tmp_path / "item.parquet")
    pq.write_table(pa.table(columns), file)
    with pytest.raises(ValueError, match=rf"item\.parquet: .*{message}"):
        ExactVocabulary.load(file, num_embeddings=3)


def test_strings_with_one_fingerprint_are_never_taken_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vocabulary_module, "_keys", lambda plain: np.full(len(plain), 42))
    vocabulary = vocabulary_of(["ann"])
    assert vocabulary.rows_of(array(["ann", "bob"])).tolist() == [0, 999]
    with pytest.raises(ValueError, match="'ann' and 'bob'"):
        vocabulary.extend([array(["bob"])])


def test_fingerprints_and_hashes_stay_as_they_are() -> None:
    """Trained tables rest on these very numbers."""
    assert integer_ids(pa.array(["", "é"])).tolist() == [-5426141060434712860, 3394012004367669963]
    # The published outputs of splitmix64 from state 0: its finaliser at 0, 1 and 2 increments.
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    rows = HashVocabulary(1000, num_hashes=2, seed=3).rows_of(pa.array([-1, 0, INT64_MAX]))
    assert rows.tolist() == [[292, 714], [187, 808], [604, 503]]


@given(st.lists(integers, min_size=1) | st.lists(strings, min_size=1), st.integers(1, 50))
def test_a_hashed_row_depends_on_the_id_alone_and_lies_in_the_table(
    ids: list[int] | list[str], num_embeddings: int
) -> None:
    vocabulary = HashVocabulary(num_embeddings, num_hashes=3)
    rows = vocabulary.rows_of(array(ids))
    assert rows.shape == (len(ids), 3) and rows.dtype == np.int64
    assert rows.min() >= 0 and rows.max() < num_embeddings
    assert np.array_equal(vocabulary.rows_of(array(ids[-1:])), rows[-1:])
