"""The cache of frozen outputs is filled by several ranks and jobs, each output once."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from recsys.content.cache import fill as frozen_cache
from recsys.content.cache.fill import cache_frozen_outputs
from recsys.data.items.kind import ContentInput
from recsys.distributed.ranks import Ranks
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.content.cache.frozen_outputs import (
    CALLS,
    NUM_ITEMS,
    TEXT,
    WITH_TEXT,
    Interrupted,
    Watched,
    assert_nothing_else_is_left,
    assert_same_outputs,
    encoder_of,
    expected_outputs,
    failures_in,
    files_in,
    fill,
    outputs,
    store_of,
)


@pytest.mark.parametrize("num_done", range(CALLS))
def test_a_fill_that_failed_goes_on_where_it_stopped(
    dataset: Path, ranks: Ranks, num_done: int
) -> None:
    with pytest.raises(Interrupted):
        fill(dataset, ranks, failing_call=num_done)
    assert len(files_in(dataset)) == num_done
    store, encoder, watched = fill(dataset, ranks)
    assert watched.items == WITH_TEXT - 2 * num_done
    assert_same_outputs(outputs(store, "text", encoder), expected_outputs(dataset))
    assert_nothing_else_is_left(dataset)


@pytest.mark.parametrize("damage", ["cut off", "empty", "other bits"])
def test_a_damaged_part_does_not_pass_for_done(dataset: Path, ranks: Ranks, damage: str) -> None:
    with pytest.raises(Interrupted):
        fill(dataset, ranks, failing_call=3)
    file = files_in(dataset)[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut off": content[:-9], "empty": b"", "other bits": content}[damage])
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


def fill_as_job_of_one(rank: int, world_size: int, dataset: Path) -> dict[str, Any]:
    """Each process is a job by itself, at the same time as the others."""
    frozen_cache.ITEMS_PER_CALL = 2
    groups = [dist.new_group([other]) for other in range(world_size)]
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), groups[rank])
    store, encoder = store_of(dataset, "text", TEXT), encoder_of("text", TEXT)
    dist.barrier()
    cache_frozen_outputs(store, "text", encoder, ranks)
    return outputs(store, "text", encoder)


def test_several_jobs_fill_one_folder_at_once(dataset: Path) -> None:
    store_of(dataset, "text", TEXT)
    expected = expected_outputs(dataset)
    for cached in run_on_ranks(fill_as_job_of_one, 2, dataset):
        assert_same_outputs(cached, expected)
    assert_nothing_else_is_left(dataset)


def fill_as_machine(
    rank: int, world_size: int, folders: list[list[Path]]
) -> list[tuple[int, dict[str, Any]]]:
    """Each rank is the only one of its machine; for each case, the items it encoded and outputs."""
    frozen_cache.ITEMS_PER_CALL = 2
    ranks = Ranks(rank, world_size, 0, 1, torch.device("cpu"))
    results = []
    for datasets in folders:
        store, encoder = store_of(datasets[rank], "text", TEXT), encoder_of("text", TEXT)
        watched = Watched(encoder)
        report = cache_frozen_outputs(store, "text", encoder, ranks)
        assert report.encoded == sum(ranks.gather(watched.items))
        results.append((watched.items, outputs(store, "text", encoder)))
    return results


def test_machines_that_share_a_folder_share_the_work_and_others_fill_their_own(
    tmp_path: Path,
) -> None:
    names = ("shared", "of the first", "of the second")
    shared, first, second = (
        write_dataset(tmp_path / name / "data", num_items=NUM_ITEMS) for name in names
    )
    expected = expected_outputs(shared)
    ranks = run_on_ranks(fill_as_machine, 2, [[shared, shared], [first, second]])
    # Two that begin the same call at once both encode it.
    assert WITH_TEXT <= sum(shared[0] for shared, _ in ranks) < 2 * WITH_TEXT
    for (_, shared_outputs), (num_separate, own_outputs) in ranks:
        assert num_separate == WITH_TEXT
        assert_same_outputs(shared_outputs, expected)
        assert_same_outputs(own_outputs, expected)
    for folder in (shared, first, second):
        assert_nothing_else_is_left(folder)


def fail_on_rank_1(rank: int, world_size: int, dataset: Path) -> str:
    frozen_cache.ITEMS_PER_CALL = 2
    store, encoder = store_of(dataset, "text", TEXT), encoder_of("text", TEXT)
    watched = Watched(encoder, failing_call=1 if rank == 1 else None)
    if rank == 0:

        def once_rank_1_failed(content: ContentInput) -> ContentInput:
            """Encode a first call at once, and the second when rank 1 has left its mark."""
            while watched.calls == 1 and not failures_in(dataset):
                time.sleep(0.01)
            return watched(content)

        encoder.frozen_outputs = once_rank_1_failed  # type: ignore[method-assign]
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    with pytest.raises((Interrupted, RuntimeError)) as caught:
        cache_frozen_outputs(store, "text", encoder, ranks)
    return str(caught.value)


def test_an_error_on_one_rank_ends_both_and_what_was_done_is_kept(
    dataset: Path, ranks: Ranks
) -> None:
    messages = run_on_ranks(fail_on_rank_1, 2, dataset)
    assert all("on purpose" in message for message in messages)
    num_done = len(files_in(dataset))
    assert 1 <= num_done <= 3  # that of rank 1, and both of rank 0, of which one may be the same
    names = [path.name for path in (dataset.parent / "cache").iterdir()]
    assert not [name for name in names if name.startswith("frozen")]
    store, encoder, watched = fill(dataset, ranks)
    assert watched.items == WITH_TEXT - 2 * num_done
    assert_same_outputs(outputs(store, "text", encoder), expected_outputs(dataset))
    assert_nothing_else_is_left(dataset)
