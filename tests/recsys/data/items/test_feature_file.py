"""Features of items in a file of their own, and the arrays that hold tokens of several lengths."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import ModalitySettings
from recsys.data.items import item_table, ragged_array
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.items.ragged_array import RaggedArray, RaggedWriter, RowWriter, share_rows
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset

NUM_ITEMS = 8
AUDIO = ModalitySettings(kind="feature", column="audio")


@pytest.fixture(autouse=True)
def blocks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_table, "BYTES_PER_BLOCK", 3 * 4 * 5 * 2)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {}, num_items=NUM_ITEMS)


def with_audio(dataset: Path, features: np.ndarray, ids: np.ndarray | None = None) -> Path:
    """Puts these features beside the items."""
    np.save(dataset / "audio.npy", features)
    column = "{kind: feature, file: audio.npy}"
    if ids is not None:
        np.save(dataset / "audio_ids.npy", ids)
        column = "{kind: feature, file: audio.npy, ids: audio_ids.npy}"
    schema = dataset / "schema.yaml"
    schema.write_text(schema.read_text() + f"    audio: {column}\n")
    return dataset


def store_of(dataset: Path, on_bad_row: Any = "error") -> ContentStore:
    root = Location.of(dataset)
    table = ItemTable(root, load_schema(root), on_bad_row)
    store = ContentStore(table, {"audio": AUDIO}, dataset.parent / "cache")
    store.build("audio")
    return store


def ids_in_files(dataset: Path) -> list[int]:
    return pq.read_table(dataset / "items")["item"].to_pylist()


def random_features(*shape: int, kind: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(kind)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_row_per_item_in_the_order_of_the_files(dataset: Path, kind: str) -> None:
    features = random_features(NUM_ITEMS, 5, kind=kind)
    content = store_of(with_audio(dataset, features)).gather(np.arange(NUM_ITEMS))["audio"]
    assert content.mask.all() and content.values.shape == (NUM_ITEMS, 1, 5)
    for row, item in enumerate(ids_in_files(dataset)):
        assert content.values[item, 0].tolist() == features[row].astype(np.float32).tolist()


def test_tokens_and_items_that_are_nan_throughout_are_not_there(dataset: Path) -> None:
    features = random_features(NUM_ITEMS, 4, 5)
    features[1, 2:] = np.nan  # two tokens
    features[3] = np.nan  # none
    content = store_of(with_audio(dataset, features)).gather(np.arange(NUM_ITEMS))["audio"]
    for row, item in enumerate(ids_in_files(dataset)):
        count = {1: 2, 3: 0}.get(row, 4)
        assert content.mask[item].tolist() == [True] * count + [False] * (4 - count)
        assert np.array_equal(content.values[item, :count], features[row, :count])
        assert not content.values[item, count:].any()


def tokens_in_column(dataset: Path, kind: pa.DataType, features: np.ndarray) -> Path:
    """Puts these features into the items' files."""
    items, schema = dataset / "items" / "part-0.parquet", dataset / "schema.yaml"
    names = [name for name in pq.read_schema(items).names if name != "audio"]
    audio = pa.array(features.tolist(), kind)
    pq.write_table(pq.read_table(items, columns=names).append_column("audio", audio), items)
    if "audio" not in schema.read_text():
        schema.write_text(schema.read_text() + "    audio: {kind: feature}\n")
    return dataset


@pytest.mark.parametrize("is_column", [False, True])
def test_the_same_values_as_other_tokens_are_read_anew(dataset: Path, is_column: bool) -> None:
    vectors = random_features(NUM_ITEMS, 6)
    tokens, width = vectors.reshape(NUM_ITEMS, 2, 3), pa.list_(pa.float32(), 3)
    if is_column:
        store_of(tokens_in_column(dataset, pa.list_(pa.float32(), 6), vectors))
        store = store_of(tokens_in_column(dataset, pa.list_(width, 2), tokens))
    else:
        store_of(with_audio(dataset, vectors))
        np.save(dataset / "audio.npy", tokens)
        store = store_of(dataset)
    content = store.gather(np.array(ids_in_files(dataset)))["audio"]
    assert np.array_equal(content.values, tokens)


def test_rows_by_id_in_any_order_for_some_items_and_for_others_that_do_not_exist(
    dataset: Path,
) -> None:
    features = random_features(4, 5)
    content = store_of(with_audio(dataset, features, np.array([6, 99, 0, 3])))
    audio = content.gather(np.arange(NUM_ITEMS))["audio"]
    assert audio.mask[:, 0].tolist() == [item in (0, 3, 6) for item in range(NUM_ITEMS)]
    for row, item in ((0, 6), (2, 0), (3, 3)):
        assert np.array_equal(audio.values[item, 0], features[row])


def test_raw_ids_find_their_items(dataset: Path) -> None:
    items = dataset / "items" / "part-0.parquet"
    table = pq.read_table(items)
    raw = [f"sku {item}" for item in table["item"].to_pylist()]
    pq.write_table(table.set_column(0, "item", pa.array(raw)), items)
    schema = dataset / "schema.yaml"
    schema.write_text(
        schema.read_text().replace(
            "num_embeddings: 8}", "num_embeddings: 997, vocabulary: {kind: hash}}"
        )
    )
    features = random_features(2, 5)
    store = store_of(with_audio(dataset, features, np.array(["sku 5", "sku 2"])))
    rows = dict(zip(raw, store.items.ids.tolist()))
    audio = store.gather(np.array([rows["sku 2"], rows["sku 5"]]))["audio"]
    assert np.array_equal(audio.values[:, 0], features[::-1])


BAD: list[tuple[np.ndarray, np.ndarray | None, str]] = [
    (
        np.zeros((7, 5), np.float32),
        None,
        r"audio.npy: has 7 rows.* 8; .*audio\.ids",
    ),
    (np.zeros((8, 5), np.int64), None, r"audio.npy: .*int64.*float16"),
    (np.zeros((8, 5), np.float32), np.zeros(7, int), r"audio_ids.npy: has shape \[7\] of int64"),
    (np.zeros((8, 5), np.float32), np.zeros(8, int), r"audio_ids.npy: id 0 "),
    (np.zeros((8, 5), np.float32), np.array(["a"] * 8), r"'item' .*string"),
]


@pytest.mark.parametrize(("features", "ids", "message"), BAD, ids=[bad[2][:30] for bad in BAD])
def test_a_file_that_does_not_fit_is_named(
    dataset: Path, features: np.ndarray, ids: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store_of(with_audio(dataset, features, ids))


def test_a_value_that_is_not_finite_is_named_by_row_or_its_item_left_out(dataset: Path) -> None:
    features = random_features(NUM_ITEMS, 5)
    features[4, 2] = np.nan
    with_audio(dataset, features)
    with pytest.raises(ValueError, match=r"audio.npy: column 'audio', row 4: .*not finite"):
        store_of(dataset)
    store = store_of(dataset, "skip")
    audio = store.gather(np.arange(NUM_ITEMS))["audio"]
    assert audio.mask.sum() == NUM_ITEMS - 1
    assert not audio.mask[ids_in_files(dataset)[4]].any()
    assert store.items.bad_rows.counts


def write(folder: Path, rows: list[list[int]]) -> RaggedArray:
    values = np.array([value for row in rows for value in row], np.int64)
    return written_array(folder, np.array([len(row) for row in rows]), values)


def written_array(folder: Path, lengths: np.ndarray, values: np.ndarray) -> RaggedArray:
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

    def max_mapped(folder: Path) -> int:
        with closing(RowWriter(folder, lengths, (1024,), "float32")) as writer:
            for row in range(2000):
                writer.write(np.array([row]), np.full((4, 1024), row, np.float32))
        assert mapped_bytes(folder / "values.npy") < 2**18  # its header
        array, largest = RaggedArray(folder), 0
        for row in range(2000):
            assert (array.gather(np.array([row]))[0] == row).all()
            if row % 100 == 0:
                largest = max(largest, mapped_bytes(folder / "values.npy"))
        return largest

    assert max_mapped(tmp_path / "small") > 28 * 2**20  # nearly the whole file of 31 MiB
    monkeypatch.setattr(ragged_array, "RESIDENT_BYTES", 4 * 2**20)
    assert max_mapped(tmp_path / "large") < 5 * 2**20


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
