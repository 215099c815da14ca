"""The step profile of a small EM3 on two ranks, whose parts are slowed by known times."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recsys.build import Job, build_job
from recsys.data.batch import Batch
from recsys.diagnostics.profile.step_profile import FIRST_STEPS, PROFILE, TRACE, StepProfile
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import batches_of, em3_config, ranks_of, table_pieces

WORLD_SIZE, BATCH, DIM, FLOAT, INT64 = 2, 4, 16, 4, 8
STEPS = 3
ALL_STEPS = FIRST_STEPS + STEPS + 1 + STEPS  # warm, timed, starting the profiler, recorded
DELAY = 0.03
SLOW = {"data": DELAY, "encoders": DELAY, "ranking": DELAY, "backward": DELAY}


@dataclass
class Run:
    """What a rank saw."""

    # Of the recorded steps: the work alone, and with the two marks of its begin and end.
    bounds: list[tuple[float, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    written: dict[str, float] = field(default_factory=dict)
    hooks: list[int] = field(default_factory=list)  # before, while recording, after
    dense_bytes: int = 0
    owned: set[str] = field(default_factory=set)  # tables on this rank
    lengths: dict[str, int] = field(default_factory=dict)  # ids per feature in its batch


def make_slow(job: Job) -> None:
    """Parts of the model then take `DELAY` longer."""

    def wait(*_: Any) -> None:
        time.sleep(DELAY)

    assert job.em3.content is not None
    job.em3.content.encoders["text"].register_forward_pre_hook(wait)
    job.em3.ranking.register_forward_pre_hook(wait)
    next(job.em3.ranking.parameters()).register_hook(wait)


def repeated(batch: Batch, delay: float) -> Iterator[Batch]:
    while True:
        time.sleep(delay)
        yield batch


def hooks_of(job: Job) -> int:
    modules = list(job.em3.modules())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return hooks + sum("encode" in vars(module) for module in modules)


def profile_slow_steps(rank: int, world_size: int, folder: Path) -> Run:
    ranks, run = ranks_of(rank, world_size), Run()
    job = build_job(em3_config(folder, "table_wise"), str(folder / "data"), ranks)
    job.model.train()
    [batch] = batches_of(job, 1, BATCH)
    profile_what_ends_early(job, repeated(batch, 0.0), folder)
    make_slow(job)
    batches = repeated(batch, DELAY)
    run.owned = {name for name, pieces in table_pieces(job).items() if pieces}
    for jagged in (batch.sparse_features, batch.sequence_features):
        assert jagged is not None
        run.lengths |= {name: len(ids.values()) for name, ids in jagged.to_dict().items()}
    run.dense_bytes = FLOAT * sum(
        parameter.numel()
        for name, parameter in job.em3.named_parameters()
        if parameter.requires_grad and not name.startswith("embedding")
    )
    run.hooks.append(hooks_of(job))
    profile = StepProfile(
        job.em3, ranks, STEPS, folder / "whole", run.said.append, run.written.update
    )
    with profile:
        marked = time.perf_counter()
        for step in range(ALL_STEPS + 2):
            began = time.perf_counter()
            job.pipeline.progress(batches)
            ended, before = time.perf_counter(), marked
            marked = time.perf_counter()
            profile.step()
            if ALL_STEPS - STEPS <= step < ALL_STEPS:
                run.bounds.append((ended - began, time.perf_counter() - before))
            if step == ALL_STEPS - 2:
                run.hooks.append(hooks_of(job))
    run.hooks.append(hooks_of(job))
    return run


def profile_what_ends_early(job: Job, batches: Iterator[Batch], folder: Path) -> None:
    """A loop that is left and entered again, then ends; one that fails; one without profile."""
    for name, steps, loops in (
        ("short", STEPS, [FIRST_STEPS + 2, FIRST_STEPS + 4]),
        ("off", 0, [3]),
    ):
        profile = StepProfile(job.em3, job.ranks, steps, folder / name)
        for length in loops:
            with profile:
                for _ in range(length):
                    job.pipeline.progress(batches)
                    profile.step()
    with (
        pytest.raises(ZeroDivisionError),
        StepProfile(job.em3, job.ranks, STEPS, folder / "failed") as profile,
    ):
        for _ in range(ALL_STEPS - 1):
            job.pipeline.progress(batches)
            profile.step()
        raise ZeroDivisionError
    assert hooks_of(job) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    write_dataset(folder / "data")
    for name in ("whole", "short", "off", "failed"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    return run_on_ranks(profile_slow_steps, WORLD_SIZE, folder)


@pytest.fixture(scope="module")
def report(runs: list[Run], folder: Path) -> Any:
    return json.loads((folder / "whole" / PROFILE).read_text())


def sent(report: Any, kind: str, part: str) -> dict[str, float]:
    [row] = [c for c in report["collectives"] if (c["kind"], c["part"]) == (kind, part)]
    return row["bytes_sent"]


def test_the_parts_of_every_step_add_up_to_its_wall_time(runs: list[Run], report: Any) -> None:
    for run, steps in zip(runs, report["ranks"]):
        for (least, most), parts in zip(run.bounds, steps, strict=True):
            assert least < sum(parts.values()) < most


def test_time_counts_for_the_part_that_took_it(report: Any) -> None:
    for steps in report["ranks"]:
        for parts in steps:
            for part, delay in SLOW.items():
                assert parts[part] >= delay
            assert parts["lookup"] > 0 and parts["fusion"] > 0 and parts["input dist"] > 0


def test_ids_sent_are_those_of_tables_elsewhere(runs: list[Run], report: Any) -> None:
    """Per id 8 bytes, per list its length in 4, and per collection 3 numbers to each rank."""
    expected = []
    for run in runs:
        elsewhere = [name for name in run.lengths if table_of(name) not in run.owned]
        ids = sum(run.lengths[name] for name in elsewhere)
        expected.append(INT64 * ids + 4 * BATCH * len(elsewhere) + 2 * 3 * INT64)
    assert sent(report, "all_to_all", "input dist")["min"] == min(expected)
    assert sent(report, "all_to_all", "input dist")["max"] == max(expected)


def test_vectors_travel_once_forward_and_once_backward(runs: list[Run], report: Any) -> None:
    """F * D floats per row for pooled features, (W - 1) / W of them from rank to rank; a sequence
    has a vector per id."""
    pooled = (WORLD_SIZE * BATCH) * 2 * DIM * FLOAT * (WORLD_SIZE - 1) / WORLD_SIZE
    sequences = (
        DIM
        * FLOAT
        * sum(
            run.lengths["item"] + run.lengths["history"] for run in runs if "item" not in run.owned
        )
    )
    for part in ("output dist", "backward"):
        of_two_ranks = sent(report, "all_to_all", part)
        assert of_two_ranks["min"] + of_two_ranks["max"] == pooled + sequences


def test_gradients_are_reduced_once(runs: list[Run], report: Any) -> None:
    expected = 2 * (WORLD_SIZE - 1) / WORLD_SIZE * runs[0].dense_bytes
    assert sent(report, "all_reduce", "backward") == dict.fromkeys(
        ("median", "min", "max"), expected
    )


def test_rank_0_tells_of_all_ranks(runs: list[Run], report: Any, folder: Path) -> None:
    assert report["world_size"] == WORLD_SIZE and report["steps"] == STEPS
    assert report["seconds"]["step_without_profiler"]["min"] > sum(SLOW.values())
    assert runs[1].said == [] and runs[1].written == {}
    [table] = runs[0].said
    assert re.match(r"profile .*3 steps.* 2 ranks\n", table)
    encoders = report["parts"]["encoders"]["median"]
    assert f"\nencoders               {1e3 * encoders:.2f}" in table
    assert runs[0].written["profile_seconds/encoders"] == encoders
    assert runs[0].written["profile_bytes/all_reduce in backward"] == runs[0].dense_bytes
    assert (folder / "whole" / TRACE).exists()


def test_modules_are_marked_only_while_steps_are_recorded(runs: list[Run]) -> None:
    for run in runs:
        before, recording, after = run.hooks
        assert before == after < recording


def test_a_loop_that_ends_early_is_profiled_as_far_as_it_came(
    runs: list[Run], folder: Path
) -> None:
    report = json.loads((folder / "short" / PROFILE).read_text())
    assert report["steps"] == 2


def test_without_steps_or_after_an_error_nothing_is_written(runs: list[Run], folder: Path) -> None:
    assert list((folder / "off").iterdir()) == []
    assert list((folder / "failed").iterdir()) == []


def table_of(feature: str) -> str:
    return "item" if feature == "history" else feature
