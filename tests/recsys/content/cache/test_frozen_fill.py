"""Filling a cache: interrupted anywhere, it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.content.cache import fill as frozen_cache
from recsys.distributed.ranks import Ranks
from tests.recsys.content.cache.frozen_outputs import (
    CALLS,
    NUM_ITEMS,
    TEXT,
    WITH_TEXT,
    Interrupted,
    assert_nothing_else_is_left,
    assert_same_outputs,
    expected_outputs,
    fill,
    outputs,
    parts_in,
    store_of,
)


@pytest.mark.parametrize("num_done", range(CALLS))
def test_a_fill_that_failed_goes_on_where_it_stopped(
    dataset: Path, ranks: Ranks, num_done: int
) -> None:
    with pytest.raises(Interrupted):
        fill(dataset, ranks, failing_call=num_done)
    assert len(parts_in(dataset)) == num_done
    store, encoder, watched = fill(dataset, ranks)
    assert watched.items == WITH_TEXT - 2 * num_done
    assert_same_outputs(outputs(store, "text", encoder), expected_outputs(dataset))
    assert_nothing_else_is_left(dataset)


@pytest.mark.parametrize("damage", ["cut off", "empty", "other bits"])
def test_a_damaged_part_does_not_pass_for_done(dataset: Path, ranks: Ranks, damage: str) -> None:
    with pytest.raises(Interrupted):
        fill(dataset, ranks, failing_call=3)
    part = parts_in(dataset)[1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes({"cut off": content[:-9], "empty": b"", "other bits": content}[damage])
    store, encoder, watched = fill(dataset, ranks)
    assert watched.items == WITH_TEXT - 2 * 2
    assert_same_outputs(outputs(store, "text", encoder), expected_outputs(dataset))


def change_texts(dataset: Path, texts: dict[int, str | None]) -> None:
    """Other texts for some items, the rows in another order."""
    file = dataset / "items" / "part-0.parquet"
    table = pq.read_table(file)
    ids = table["item"].to_pylist()
    values = [texts.get(item, text) for item, text in zip(ids, table["text"].to_pylist())]
    table = table.set_column(1, "text", pa.array(values, pa.string()))
    pq.write_table(table.take(pa.array(range(NUM_ITEMS - 1, -1, -1))), file)


def test_of_changed_items_alone_the_encoder_runs_again(dataset: Path, ranks: Ranks) -> None:
    first = fill(dataset, ranks)[0].folders["text"]
    change_texts(dataset, {3: "a blue house", 4: None, 0: "a text where there was none"})
    expected = expected_outputs(dataset)
    store, encoder, watched = fill(dataset, ranks)
    assert store.folders["text"] != first
    assert watched.items == 2
    assert_same_outputs(outputs(store, "text", encoder), expected)
    assert first.is_dir()  # another run may still read it


def test_a_damaged_earlier_cache_is_not_used(dataset: Path, ranks: Ranks) -> None:
    first = fill(dataset, ranks)[0].folders["text"]
    (first / "offsets.npy").write_bytes(b"")
    change_texts(dataset, {3: "a blue house"})
    expected = expected_outputs(dataset)
    store, encoder, watched = fill(dataset, ranks)
    assert watched.items == WITH_TEXT
    assert_same_outputs(outputs(store, "text", encoder), expected)


@pytest.fixture
def repeats(dataset: Path) -> Path:
    """Two items have the text of another one, which leaves two texts fewer to encode."""
    table = pq.read_table(dataset / "items" / "part-0.parquet")
    texts = dict(zip(table["item"].to_pylist(), table["text"].to_pylist()))
    with_text = [item for item in sorted(texts) if texts[item]]
    change_texts(dataset, dict.fromkeys(with_text[2:4], texts[with_text[0]]))
    return dataset


def test_equal_texts_are_encoded_once_and_share_their_output(
    repeats: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_cache, "ITEMS_PER_CALL", 1)
    distinct = set(store_of(repeats, "text", TEXT).hashes["text"]) - {b""}
    assert len(distinct) < WITH_TEXT
    with pytest.raises(Interrupted):
        fill(repeats, ranks, failing_call=1)  # one text is done
    store, encoder, watched = fill(repeats, ranks)
    assert watched.items == len(distinct) - 1
    assert_same_outputs(outputs(store, "text", encoder), expected_outputs(repeats))
    array = store.arrays["text"]
    assert (len(array), int((array.lengths > 0).sum())) == (NUM_ITEMS, WITH_TEXT)
    assert len(array.values) < array.lengths.sum()
    assert_nothing_else_is_left(repeats)
    assert fill(repeats, ranks)[2].items == 0


def test_a_cache_of_shared_outputs_serves_later_catalogues(repeats: Path, ranks: Ranks) -> None:
    fill(repeats, ranks)
    change_texts(repeats, {2: "a blue house"})
    expected = expected_outputs(repeats)
    store, encoder, watched = fill(repeats, ranks)
    assert watched.items == 1
    assert_same_outputs(outputs(store, "text", encoder), expected)
