"""Warm starts on several ranks, of any plan, and of jobs that are stopped or killed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.checkpoint.state import TrainingState
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.distributed.lockstep import TrainingStopped
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.training.train import train
from tests.ranks import run_on_ranks
from tests.recsys.checkpoint.stopped_runs import StepsSeen
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    begin,
    changed,
    config_of,
    grow,
    ids_of,
    last_of,
    logits,
    start,
    state_of,
    stored_state,
    write_ids,
)
from tests.recsys.em3_runs import ranks_of

Shards = dict[str, list[tuple[list[int], Tensor]]]


def begin_on_rank(
    rank: int, world_size: int, folder: Path, data: Path, out: Path, argv: list[str]
) -> tuple[bool, Shards]:
    """Whether it predicts as the other run does here, and the shards after a start on new data."""
    ranks = ranks_of(rank, world_size)
    expected = logits(load_run(folder / "run", None, ranks, "cpu", argv))
    unchanged = begin(folder, out / "same", ranks, *argv)
    assert unchanged.text == "nothing differs"
    is_equal = torch.equal(logits(unchanged.job), expected)
    job = begin(folder, out / "new", ranks, *argv, data=data, checkpoint="last").job
    state = TrainingState(job).state_dict()
    sharded = {name: value for name, value in state.items() if isinstance(value, ShardedTensor)}
    shards: Shards = {
        name: [(list(shard.metadata.shard_offsets), shard.tensor) for shard in value.local_shards()]
        for name, value in sharded.items()
    }
    return is_equal, shards


def assembled(shards: list[Shards], expected: Tensor, name: str) -> Tensor:
    """A sharded tensor of all ranks."""
    result = torch.full_like(expected, 77)
    for offsets, tensor in (shard for rank_shards in shards for shard in rank_shards[name]):
        sides = zip(offsets, tensor.shape, strict=True)
        result[tuple(slice(first, first + size) for first, size in sides)] = tensor
    return result


@pytest.mark.parametrize(
    ("kind", "world_size", "sharding"),
    [
        ("multimodal", 2, "row_wise"),
        pytest.param("plain", 2, "column_wise", marks=pytest.mark.long),
        pytest.param("plain", 3, "row_wise", marks=pytest.mark.long),
        pytest.param("multimodal", 3, "table_wise", marks=pytest.mark.long),
    ],
)
def test_every_number_of_ranks_and_plan_gets_the_same_rows(
    kind: str, world_size: int, sharding: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    old_ids = ids_of(folder / "data")
    data = write_ids(changed(folder, tmp_path, grow), [901, *reversed(old_ids), 902])
    argv: list[str] = WITHOUT_CONTENT if kind == "plain" else []
    with start(folder, tmp_path / "one", *argv, data=data, checkpoint="last") as new:
        expected = state_of(new.job)
    on_ranks: list[Any] = [*argv, "--embedding.sharding", sharding]
    results = run_on_ranks(begin_on_rank, world_size, folder, data, tmp_path, on_ranks)
    assert all(is_equal for is_equal, _ in results)
    shards = [rank_shards for _, rank_shards in results]
    names = [name for name in shards[0] if name in expected]
    kinds = {name.split(".")[0] for name in names}
    assert kinds >= {"model", "vocabulary", "optimizer"} - (
        {"optimizer"} if sharding == "column_wise" else set()
    )
    for name in names:
        assert torch.equal(assembled(shards, expected[name], name), expected[name]), name


@pytest.mark.long
def test_a_warm_started_run_that_was_stopped_ends_with_the_same_bits(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_ids(changed(plain, tmp_path, grow), [901, *reversed(ids_of(plain / "data"))])
    fitted = data / "transforms.yaml"  # fitted anew, which is not read
    fitted.write_text(re.sub(r"mean: [^,}]+", "mean: 7.5", fitted.read_text()))
    assert "7.5" in fitted.read_text()
    request = WarmStart(plain / "run")

    def run(name: str, **arguments: Any) -> Path:
        with joined_ranks("cpu") as ranks:
            config = config_of(plain, *WITHOUT_CONTENT)
            train(config, str(data), tmp_path / name / "run", ranks, **arguments)
        return tmp_path / name

    full_run = run("whole", warm_start=request)
    steps_seen = StepsSeen(monkeypatch, stop_after=2)
    with pytest.raises(TrainingStopped):
        run("stopped", warm_start=request)
    assert [step for step, _ in steps_seen.steps][:2] == [1, 2]  # those of the new run
    with pytest.raises(ValueError, match=r"warm_start\.json"):
        run("stopped", warm_start=WarmStart(plain / "run", optimizer=False))
    stopped = run("stopped", warm_start=request)
    one, two = stored_state(last_of(full_run)), stored_state(last_of(stopped))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    progress = json.loads((last_of(stopped) / "checkpoint.json").read_text())["progress"]
    assert (progress["steps"], progress["steps_before"]) == (4, 8)
    # The ids of the bounded vocabulary were last used in the steps that follow those of the run.
    assert two["vocabulary.user.last_used"].max() == 11
