"""The memory bank against a plain dict, on one rank and on several."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor

from embeddings import MemoryBank, build_memory_bank
from embeddings.memory_bank import BankRoute, ReplicatedMemoryBank
from tests.ranks import run_on_ranks

NUM_ITEMS, DIM, STEPS = 7, 3, 5
KINDS = [MemoryBank, ReplicatedMemoryBank]


def planned_update(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """What a rank writes in a step: ids drawn with repetition, and none at all now and then."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    count = 0 if (rank + step) % 3 == 0 else 4
    ids = torch.randint(0, NUM_ITEMS, (count,), generator=generator)
    return ids, torch.randn(count, DIM, generator=generator)


def expected_rows(world_size: int) -> dict[int, tuple[list[float], int]]:
    """A plain dict after all updates: within a step a later rank overwrites an earlier one."""
    rows: dict[int, tuple[list[float], int]] = {}
    for step in range(STEPS):
        for rank in range(world_size):
            for item, vector in zip(*planned_update(rank, step), strict=True):
                rows[int(item)] = (vector.tolist(), step)
    return rows


def fill(bank: MemoryBank, rank: int) -> None:
    for step in range(STEPS):
        ids, vectors = planned_update(rank, step)
        bank.update(ids, vectors.requires_grad_(), step)


def assert_holds(
    bank_rows: tuple[Tensor, Tensor], rows: dict[int, tuple[list[float], int]]
) -> None:
    vectors, steps = bank_rows
    for item in range(NUM_ITEMS):
        vector, step = rows.get(item, ([0.0] * DIM, -1))
        assert vectors[item].tolist() == vector
        assert int(steps[item]) == step


def plain_bank() -> MemoryBank:
    return MemoryBank(NUM_ITEMS, DIM, "cpu")


def test_coverage_and_mean_age_count_items_ever_written() -> None:
    bank = plain_bank()
    assert bank.coverage() == 0.0
    assert math.isnan(bank.mean_age(step=4))
    bank.update(torch.tensor([1, 5]), torch.ones(2, DIM), step=0)
    bank.update(torch.tensor([5]), torch.ones(1, DIM), step=3)
    assert bank.coverage() == pytest.approx(2 / 7)
    assert bank.mean_age(step=4) == pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize("item", [-1, NUM_ITEMS])
def test_an_id_outside_the_bank_is_named(item: int) -> None:
    bank, ids = plain_bank(), torch.tensor([0, item])
    with pytest.raises(ValueError, match=rf"item id {item} is outside \[0, {NUM_ITEMS}\)"):
        bank.lookup(ids)
    with pytest.raises(ValueError, match=rf"item id {item} is outside \[0, {NUM_ITEMS}\)"):
        bank.update(ids, torch.zeros(2, DIM), step=0)


def test_wrong_shapes_are_refused() -> None:
    bank, one = plain_bank(), torch.tensor([0])
    with pytest.raises(ValueError, match=r"pass \[1, 3\]"):
        bank.update(one, torch.zeros(1, DIM + 1), step=0)
    with pytest.raises(ValueError, match=r"pass \[U\] int64"):
        bank.lookup(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="num_items is 0"):
        MemoryBank(0, DIM, "cpu")


def fill_and_save(
    rank: int, world_size: int, folder: str, kind: type[MemoryBank]
) -> tuple[tuple[Tensor, Tensor], float, float]:
    bank = kind(NUM_ITEMS, DIM, "cpu", dist.group.WORLD)
    fill(bank, rank)
    checkpoint.save({"bank": bank.state_dict()}, checkpoint_id=folder)
    # Rank 0 asks for nothing, the last rank for everything.
    ids = torch.arange(NUM_ITEMS) if rank == world_size - 1 else torch.empty(0, dtype=torch.int64)
    return bank.lookup(ids), bank.coverage(), bank.mean_age(STEPS)


def load(rank: int, world_size: int, folder: str, kind: type[MemoryBank]) -> tuple[Tensor, Tensor]:
    bank = kind(NUM_ITEMS, DIM, "cpu", dist.group.WORLD)
    checkpoint.load({"bank": bank.state_dict()}, checkpoint_id=folder)
    bank.finish_loading()
    assert_works_with_fewer_items_than_ranks(rank, kind)
    return bank.lookup(torch.arange(NUM_ITEMS))


def assert_works_with_fewer_items_than_ranks(rank: int, kind: type[MemoryBank]) -> None:
    bank, only = kind(1, DIM, "cpu", dist.group.WORLD), torch.tensor([0])
    bank.update(only, torch.full((1, DIM), 4.0), step=rank)
    assert bank.lookup(only)[0].tolist() == [[4.0] * DIM]
    assert bank.coverage() == 1.0


@pytest.mark.parametrize(("kind", "other"), [KINDS, KINDS[::-1]])
def test_ranks_share_one_bank_and_a_checkpoint_loads_on_any_number_of_them(
    tmp_path: Path, kind: type[MemoryBank], other: type[MemoryBank]
) -> None:
    rows = expected_rows(world_size=2)
    first, last = run_on_ranks(fill_and_save, 2, str(tmp_path), kind)
    assert first[0][0].shape == (0, DIM) and first[0][1].shape == (0,)
    assert_holds(last[0], rows)
    for _, coverage, mean_age in (first, last):
        assert coverage == pytest.approx(len(rows) / NUM_ITEMS)
        assert mean_age == pytest.approx(sum(STEPS - step for _, step in rows.values()) / len(rows))
    for world_size, loads in ((1, MemoryBank), (3, other)):
        for loaded in run_on_ranks(load, world_size, str(tmp_path), loads):
            assert_holds(loaded, rows)
    bank = plain_bank()
    state = {"bank": bank.state_dict()}
    checkpoint.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    assert_holds(bank.lookup(torch.arange(NUM_ITEMS)), rows)


WRITES = [[NUM_ITEMS - 1, 0, 2], [3, 5, 1], [4]]  # items of each rank


def routed(
    rank: int, world_size: int, kind: type[MemoryBank]
) -> tuple[tuple[BankRoute | None, BankRoute | None], Tensor, Tensor, Tensor]:
    """Vectors read by a route found beforehand and by one found on the spot, after a write each."""
    banks = [kind(NUM_ITEMS, DIM, "cpu", dist.group.WORLD) for _ in range(2)]
    reads = torch.tensor([5, 0, 3, 3, NUM_ITEMS - 1]) if rank else torch.tensor([2, 5])
    writes = torch.tensor(WRITES[rank])
    vectors = torch.arange(float(len(writes) * DIM)).view(-1, DIM) + 100 * rank
    pending = banks[0].routes(reads, writes)
    only_reads = banks[0].routes(reads)  # another one, before the first is finished
    read, write = pending()
    banks[0].update(writes, vectors, 0, write)
    banks[1].update(writes, vectors, 0)
    expected = torch.zeros(NUM_ITEMS, DIM)
    for other, ids in enumerate(WRITES[:world_size]):
        expected[ids] = torch.arange(float(len(ids) * DIM)).view(-1, DIM) + 100 * other
    ahead, on_the_spot = banks[0].lookup(reads, read)[0], banks[1].lookup(reads)[0]
    return only_reads(), ahead, on_the_spot, expected[reads]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_routes_found_ahead_carry_the_same_rows(world_size: int, kind: type[MemoryBank]) -> None:
    for only_reads, ahead, on_the_spot, expected in run_on_ranks(routed, world_size, kind):
        assert torch.equal(ahead, expected) and torch.equal(on_the_spot, expected)
        assert only_reads[1] is None and (only_reads[0] is None) == (kind is ReplicatedMemoryBank)


def written_by_all(rank: int, world_size: int) -> tuple[BankRoute | None, list[float]]:
    bank = MemoryBank(NUM_ITEMS, DIM, "cpu", dist.group.WORLD)
    ids = torch.tensor([0, 2, NUM_ITEMS - 1])
    _, write = bank.routes(ids, ids)()
    bank.update(ids, torch.full((3, DIM), float(rank)), 0, write)
    return write, bank.lookup(ids)[0][:, 0].tolist()


def test_a_row_that_several_ranks_write_is_written_once_by_the_last() -> None:
    """On a GPU the order of several writes to one row is not defined."""
    for write, values in run_on_ranks(written_by_all, 3):
        assert write is not None and len(write.rows.unique()) == len(write.rows)
        assert values == [2.0] * 3


def kinds_by_placement(rank: int, world_size: int) -> dict[str, type[MemoryBank]]:
    large = {"auto": 100_000_000, "auto, small": 100, "sharded": 100, "replicated": 100}
    banks = {
        name: build_memory_bank(items, 1, "meta", dist.group.WORLD, name.split(",")[0])
        for name, items in large.items()
    }
    return {name: type(bank) for name, bank in banks.items()}


def test_a_small_bank_is_replicated_unless_told_otherwise() -> None:
    for kinds in run_on_ranks(kinds_by_placement, 2):
        assert kinds == {
            "auto": MemoryBank,
            "auto, small": ReplicatedMemoryBank,
            "sharded": MemoryBank,
            "replicated": ReplicatedMemoryBank,
        }
