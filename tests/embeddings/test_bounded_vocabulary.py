"""The bounded vocabulary against a slow one of plain Python, on one rank and on several."""

from collections import Counter
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import embeddings.vocabulary.bounded as bounded_module
from embeddings.vocabulary.bounded import BoundedVocabulary
from embeddings.vocabulary.fixed import mix64
from tests.ranks import run_on_ranks


@dataclass
class _KnownId:
    row: int
    score: float
    last_used: int


@dataclass
class SlowVocabulary:
    """One set of rows after the other, one id after the other."""

    num_sets: int
    rows_per_set: int
    admit_after: int
    half_life: float
    protect_steps: int
    entries: dict[int, _KnownId] = field(default_factory=dict)
    waiting: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    admitted: int = 0

    def set_of(self, item: int) -> int:
        return int(mix64(np.array([item]))[0] % np.uint64(self.num_sets))

    def slot_of(self, item: int) -> tuple[int, int]:
        slot = mix64(mix64(np.array([item])))[0] % np.uint64(self.rows_per_set)
        return self.set_of(item), int(slot)

    def faded(self, entry: _KnownId, step: int) -> float:
        return float(entry.score * np.exp2((entry.last_used - step) / self.half_life))

    def use(self, ids: list[int], step: int) -> set[int]:
        """The rows taken from other ids."""
        counts = Counter(ids)
        for item in counts.keys() & self.entries.keys():
            entry = self.entries[item]
            entry.score, entry.last_used = self.faded(entry, step) + counts[item], step
        occurrences = {item: counts[item] for item in sorted(counts.keys() - self.entries.keys())}
        if self.admit_after > 1:
            for item, slot in [
                (item, self.waiting.get(self.slot_of(item))) for item in occurrences
            ]:
                occurrences[item] += slot[1] if slot and slot[0] == item else 0
            for item, count in occurrences.items():
                self.waiting[self.slot_of(item)] = (item, count)
        evicted = set()
        for item in sorted(occurrences, key=lambda item: -occurrences[item]):
            row = (
                self.next_row(self.set_of(item), step)
                if occurrences[item] >= self.admit_after
                else None
            )
            if row is None:
                continue
            for other in [other for other, entry in self.entries.items() if entry.row == row]:
                del self.entries[other]
                evicted.add(row)
            self.entries[item] = _KnownId(row, occurrences[item], step)
            self.admitted += 1
            if self.waiting.get(self.slot_of(item), (None,))[0] == item:
                del self.waiting[self.slot_of(item)]
        return evicted

    def next_row(self, set_number: int, step: int) -> int | None:
        rows = range(set_number * self.rows_per_set, (set_number + 1) * self.rows_per_set)
        entries = {entry.row: entry for entry in self.entries.values()}
        free = [row for row in rows if row not in entries]
        if free:
            return free[0]
        usable = [row for row in rows if entries[row].last_used < step - self.protect_steps]
        return min(
            usable,
            key=lambda row: (self.faded(entries[row], step), entries[row].last_used, row),
            default=None,
        )


@pytest.fixture
def three_rows_per_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_module, "MAX_ROWS_PER_SET", 3)


ids_of_step = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, -1, -(2**63), 2**63 - 1]))


@pytest.mark.usefixtures("three_rows_per_set")
@given(
    steps=st.lists(st.tuples(ids_of_step, st.integers(1, 2)), max_size=15),
    num_embeddings=st.sampled_from([2, 4, 7, 9]),
    admit_after=st.integers(1, 3),
    half_life=st.sampled_from([1.0, float("inf")]),
    protect_steps=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_rows_are_those_of_the_slow_vocabulary(
    steps: list[tuple[list[int], int]],
    num_embeddings: int,
    admit_after: int,
    half_life: float,
    protect_steps: int,
) -> None:
    vocabulary = BoundedVocabulary(num_embeddings, admit_after, half_life, protect_steps)
    sizes = vocabulary.num_sets, vocabulary.rows_per_set
    slow = SlowVocabulary(*sizes, admit_after, half_life, protect_steps)
    unknown, last_used, step, evictions = num_embeddings - 1, dict[int, int](), 0, 0
    for ids, pause in steps:
        rows = vocabulary.rows_of(torch.tensor(ids, dtype=torch.int64), step, training=True)
        evicted = set(vocabulary.take_evicted_rows().tolist())
        assert evicted == slow.use(ids, step)
        evictions += len(evicted)
        expected = {item: entry.row for item, entry in slow.entries.items()}
        assert rows.tolist() == [expected.get(item, unknown) for item in ids]
        # What must hold whatever the policy.
        assert all(step - last_used[row] > protect_steps for row in evicted)
        item_by_row = {row: item for item, row in zip(ids, rows.tolist()) if row != unknown}
        assert all(row < unknown for row in item_by_row)
        assert len(item_by_row) == len({item for item, row in zip(ids, rows) if row != unknown})
        last_used |= dict.fromkeys(item_by_row, step)
        step += pause
    assert len(slow.entries) <= num_embeddings - 1
    counts = vocabulary.counts()
    assert (counts.admitted, counts.evicted) == (slow.admitted, evictions)
    assert counts.known == len(slow.entries) == counts.admitted - counts.evicted


def look_up(vocabulary: BoundedVocabulary, ids: list[int]) -> list[int]:
    return vocabulary.rows_of(torch.tensor(ids), step=10**6, training=False).tolist()


def use(vocabulary: BoundedVocabulary, ids: list[int], step: int) -> list[int]:
    return vocabulary.rows_of(torch.tensor(ids), step, training=True).tolist()


def test_prediction_gives_unknown_ids_the_last_row_and_learns_nothing() -> None:
    vocabulary = BoundedVocabulary(num_embeddings=5)
    use(vocabulary, [7], step=0)
    for _ in range(2):
        assert look_up(vocabulary, [7, 8, 0]) == [0, 4, 4]
    assert astuple(vocabulary.counts()) == (7, 4, 1, 0, 1)
    assert astuple(vocabulary.counts()) == (0, 0, 0, 0, 1)


def test_a_large_table_holds_nearly_as_many_ids_as_it_has_rows() -> None:
    vocabulary = BoundedVocabulary(num_embeddings=10_001)
    for step, ids in enumerate(np.split(np.arange(10_000) * 977, 50)):
        use(vocabulary, ids.tolist(), step)
    assert vocabulary.counts().known > 0.94 * 10_000


# 301 rows: three sets, so that of two ranks one has more, and of three each has one.
STEPS, IDS_PER_STEP = 15, 200


def bounded(group: dist.ProcessGroup | None = None) -> BoundedVocabulary:
    return BoundedVocabulary(301, admit_after=2, half_life=5.0, process_group=group)


def ids_of(step: int) -> torch.Tensor:
    """Popular ids and rare ones, some of them several times in a step."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.rand(IDS_PER_STEP, generator=generator) ** 2
    return (drawn * 1500).long() * 1_000_003 - 300


@dataclass
class Outcome:
    """What the map did in some steps."""

    rows: list[torch.Tensor]  # of each step, this rank's part
    evicted: list[list[int]]
    counts: tuple[int, ...]


def run(vocabulary: BoundedVocabulary, steps: range, rank: int = 0, world_size: int = 1) -> Outcome:
    """Each rank takes a part of a step's ids, the first none at all in every third step."""
    rows, evicted = [], []
    for step in steps:
        lists = list(ids_of(step).tensor_split(world_size))
        if world_size > 1 and step % 3 == 0:
            lists = [torch.zeros(0, dtype=torch.int64), *ids_of(step).tensor_split(world_size - 1)]
        rows.append(vocabulary.rows_of(lists[rank], step, training=True))
        evicted.append(sorted(vocabulary.take_evicted_rows().tolist()))
    return Outcome(rows, evicted, astuple(vocabulary.counts()))


def run_and_save(rank: int, world_size: int, folder: str) -> tuple[Outcome, Outcome]:
    vocabulary = bounded(dist.group.WORLD)
    first = run(vocabulary, range(STEPS), rank, world_size)
    checkpoint.save(vocabulary.state_dict(), checkpoint_id=folder)
    return first, run(vocabulary, range(STEPS, 2 * STEPS), rank, world_size)


def load_and_go(rank: int, world_size: int, folder: str) -> Outcome:
    assert_ranks_without_rows_ask_the_others()
    vocabulary = bounded(dist.group.WORLD)
    checkpoint.load(vocabulary.state_dict(), checkpoint_id=folder)
    return run(vocabulary, range(STEPS, 2 * STEPS), rank, world_size)


def assert_ranks_without_rows_ask_the_others() -> None:
    vocabulary = BoundedVocabulary(3, process_group=dist.group.WORLD)
    assert vocabulary.num_sets == 1
    assert use(vocabulary, [5, 6], step=0) == [0, 1]


def assert_outcomes(ranks: list[Outcome], expected: Outcome) -> None:
    for step, rows in enumerate(expected.rows):
        assert torch.equal(torch.cat([rank.rows[step] for rank in ranks]), rows)
    assert all(rank.evicted == expected.evicted for rank in ranks)
    assert all(rank.counts == expected.counts for rank in ranks)


def test_any_number_of_ranks_has_the_map_of_one_and_goes_on_from_a_checkpoint(
    tmp_path: Path,
) -> None:
    vocabulary = bounded()
    first, second = (run(vocabulary, range(start, start + STEPS)) for start in (0, STEPS))
    assert first.counts[3] > 0 and second.counts[3] > 0 and second.counts[1] > 0
    ranks = run_on_ranks(run_and_save, 2, str(tmp_path))
    assert_outcomes([rank[0] for rank in ranks], first)
    assert_outcomes([rank[1] for rank in ranks], second)
    assert_outcomes(run_on_ranks(load_and_go, 3, str(tmp_path)), second)
    alone = bounded()
    checkpoint.load(alone.state_dict(), checkpoint_id=str(tmp_path), no_dist=True)
    assert_outcomes([run(alone, range(STEPS, 2 * STEPS))], second)
