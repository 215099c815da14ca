"""The profile of steps: parts of the model in the table and the trace, and nothing left behind."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from recsys.build import Job, build_job
from recsys.data.batch import Batch
from recsys.diagnostics.profile import FIRST_STEPS, TRACE, StepProfile
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import batches_of, em3_config, ranks_of

STEPS = 3
ALL_STEPS = FIRST_STEPS + 1 + STEPS
FOLDERS = ("whole", "off", "failed")


@dataclass
class Run:
    """What a rank saw."""

    texts: list[str] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)  # before, while recording, after


def repeated(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def hooks_of(job: Job) -> int:
    modules = list(job.em3.modules())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return hooks + sum("encode" in vars(module) for module in modules)


def profiled_runs(rank: int, world_size: int, folder: Path) -> dict[str, Run]:
    """Whole; without steps; ended by an error."""
    job = build_job(em3_config(folder), str(folder / "data"), ranks_of(rank, world_size))
    job.model.train()
    [batch] = batches_of(job, 1, 4)
    batches, runs = repeated(batch), {}
    for name, steps, length in (
        ("whole", STEPS, ALL_STEPS + 2),
        ("off", 0, 3),
        ("failed", STEPS, ALL_STEPS - 1),
    ):
        run = runs[name] = Run()
        profile = StepProfile(job.em3, job.ranks, steps, folder / name)
        run.hooks.append(hooks_of(job))
        try:
            with mock.patch("recsys.diagnostics.profile.print_table", run.texts.append), profile:
                for step in range(length):
                    job.pipeline.progress(batches)
                    profile.step()
                    if step == FIRST_STEPS:
                        run.hooks.append(hooks_of(job))
                if name == "failed":
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        run.hooks.append(hooks_of(job))
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    write_dataset(folder / "data")
    for name in FOLDERS:
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Run]]:
    return run_on_ranks(profiled_runs, 2, folder)


def test_rank_0_prints_the_parts_and_writes_its_trace(
    ranks: list[dict[str, Run]], folder: Path
) -> None:
    first, second = (rank["whole"] for rank in ranks)
    assert second.texts == []
    [table] = first.texts
    with gzip.open(folder / "whole" / TRACE, "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    for part in ("lookup", "output dist", "encoders", "fusion", "content", "ranking", "losses"):
        assert f"## {part} ##" in names
    assert "## ranking ##" in table and f"{STEPS}" in table


def test_modules_are_hooked_only_while_steps_are_recorded(ranks: list[dict[str, Run]]) -> None:
    old_hooks, active_hooks, new_hooks = ranks[0]["whole"].hooks
    assert old_hooks == new_hooks < active_hooks
    assert ranks[0]["failed"].hooks[-1] == old_hooks
    assert len(set(ranks[1]["whole"].hooks)) == 1


def test_without_steps_or_after_an_error_nothing_is_written(
    ranks: list[dict[str, Run]], folder: Path
) -> None:
    for name in ("off", "failed"):
        assert list((folder / name).iterdir()) == [] and ranks[0][name].texts == []
