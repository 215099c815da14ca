"""Parts of a step from the ranges in a trace: each moment counts once, for the innermost range."""

from typing import Any

import pytest

from recsys.diagnostics.profile.step_trace import PART, STEP, read_steps

MAIN, AUTOGRAD, STREAM = 1, 2, 7


def event(name: str, begin: float, end: float, **fields: Any) -> dict[str, Any]:
    """An event of a Chrome trace; times in milliseconds."""
    values = {"ph": "X", "cat": "user_annotation", "tid": MAIN, "args": {}}
    return {**values, "name": name, "ts": 1e3 * begin, "dur": 1e3 * (end - begin), **fields}


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {part: round(1e3 * value, 6) for part, value in seconds.items() if value}


def test_nested_ranges_count_once_and_the_parts_add_up_to_the_step() -> None:
    [step] = read_steps(
        [
            event(STEP, 0, 100),
            event("## copy_batch_to_gpu 5 ##", 0, 10),
            event("## next_batch ##", 2, 9),
            event("## forward 3 ##", 10, 60),
            event(PART + "content", 20, 50),
            event(PART + "encoders", 25, 40),
            event("aten::linear", 26, 39, cat="cpu_op"),
            event("## backward 3 ##", 60, 85),
            event("## optimizer 3 ##", 90, 98),
        ],
        rank=0,
        world_size=1,
    )
    expected = {"data": 10, "encoders": 15, "content": 15, "backward": 25, "optimizer": 8}
    assert milliseconds(step.seconds) == {**expected, "other": 27}
    assert sum(step.seconds.values()) == pytest.approx(0.1)


def test_what_the_backward_computes_again_counts_as_backward() -> None:
    [step] = read_steps(
        [
            event(STEP, 0, 10),
            event("## backward 0 ##", 0, 10),
            event(PART + "content", 2, 8),
            event(PART + "encoders", 3, 5),
        ],
        rank=0,
        world_size=1,
    )
    assert milliseconds(step.seconds) == {"backward": 10}


def test_each_step_has_its_own_ranges_and_what_lies_between_steps_counts_nowhere() -> None:
    steps = read_steps(
        [
            event(STEP, 20, 30),
            event("## optimizer 1 ##", 22, 30),
            event(STEP, 0, 10),
            event("## optimizer 0 ##", 5, 10),
            event("## copy_batch_to_gpu 0 ##", 12, 18),
        ],
        rank=0,
        world_size=1,
    )
    assert [milliseconds(step.seconds) for step in steps] == [
        {"other": 5, "optimizer": 5},
        {"other": 2, "optimizer": 8},
    ]


def test_a_kernel_counts_for_the_part_that_launched_it() -> None:
    launch: dict[str, Any] = {"cat": "cuda_runtime"}
    kernel: dict[str, Any] = {"cat": "kernel", "tid": STREAM}
    [step] = read_steps(
        [
            event(STEP, 0, 100),
            event(STEP, 0, 140, cat="gpu_user_annotation", tid=STREAM),
            event(PART + "ranking", 10, 20),
            event("## backward 0 ##", 30, 90),
            event("cudaLaunchKernel", 12, 13, args={"correlation": 1}, **launch),
            event("gemm", 60, 80, args={"correlation": 1}, **kernel),
            event("cudaLaunchKernel", 40, 41, tid=AUTOGRAD, args={"correlation": 2}, **launch),
            event("gemm backward", 80, 130, args={"correlation": 2}, **kernel),
            event("cudaLaunchKernel", 150, 151, args={"correlation": 3}, **launch),
            event("of no step", 151, 152, args={"correlation": 3}, **kernel),
        ],
        rank=0,
        world_size=1,
    )
    assert milliseconds(step.device_seconds) == {"ranking": 20, "backward": 50}


def test_a_trace_without_steps_has_none() -> None:
    assert read_steps([event("## forward 0 ##", 0, 1)], rank=0, world_size=1) == []
