"""Reads training steps from a profiler's trace: seconds by part, bytes by collective.

Ranges nest: those of TorchRec's pipeline and those of the modules that
`recsys.diagnostics.profile.step_profile` has marked. Each moment of a step belongs to the innermost
range, so that nothing counts twice and the parts add up to the step. (`key_averages` of the
profiler sums by name, nested ranges included.) The trace is the one of `torch.profiler` in Chrome's
format, with shapes recorded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from recsys.diagnostics.profile.collective_trace import Collective, read_collectives

STEP = "ProfilerStep#"  # prefix of the range that torch.profiler puts around a step
PART = "part of step: "  # prefix of the name of a range, before the part
PARTS = (
    "data",  # waiting for the next batch, agreeing on it, moving it to the device
    "input dist",  # ids to the ranks that hold their rows
    "lookup",
    "output dist",  # looked-up vectors back
    "encoders",
    "fusion",
    "content",  # the rest of the content branch: projections, bank, history
    "ranking",
    "losses",
    "backward",  # with its collectives and the fused optimizers of the tables
    "optimizer",
    "other",
)
# Ranges of TrainPipelineSparseDist, by the prefix of their names.
PIPELINE_RANGES = {
    "## copy_batch_to_gpu": "data",
    "## wait_for_batch": "data",
    "## start_sparse_data_dist": "input dist",
    "## wait_sparse_data_dist": "input dist",
    "## runtime_forward_assemble_KJT": "input dist",
    "## zero_grad": "optimizer",
    "## backward": "backward",
    "## optimizer": "optimizer",
}


@dataclass
class StepTrace:
    """One step of a rank."""

    seconds: dict[str, float]  # by part
    device_seconds: dict[str, float] = field(default_factory=dict)  # kernels, by launching part
    collectives: list[tuple[str, Collective]] = field(default_factory=list)  # with their parts


class Timeline:
    """The part of a step that its thread is in at each moment.

    Args:
        step: the step's own event.
        ranges: events of the thread with known parts, which may nest.
    """

    def __init__(self, step: dict[str, Any], ranges: list[dict[str, Any]]) -> None:
        """Compute the moments at which the part changes."""
        self.begin, self.end = step["ts"], _end(step)
        self.moments, self.parts = [self.begin], ["other"]  # the part from each moment on
        open_ranges: list[tuple[float, str]] = []
        for event in sorted(ranges, key=lambda event: (event["ts"], -event["dur"])):
            self._close(open_ranges, event["ts"])
            # A part of the forward that is recomputed in the backward counts as backward.
            inside_backward = bool(open_ranges) and open_ranges[-1][1] == "backward"
            part = "backward" if inside_backward else _part_of(event["name"])
            assert part is not None
            open_ranges.append((_end(event), part))
            self._append(event["ts"], part)
        self._close(open_ranges, self.end)

    def _close(self, open_ranges: list[tuple[float, str]], moment: float) -> None:
        while open_ranges and open_ranges[-1][0] <= moment:
            end, _ = open_ranges.pop()
            self._append(end, open_ranges[-1][1] if open_ranges else "other")

    def _append(self, moment: float, part: str) -> None:
        self.moments.append(moment)
        self.parts.append(part)

    def part_at(self, moment: float) -> str:
        """Return the part at a moment of the trace, in microseconds."""
        return self.parts[bisect_right(self.moments, moment) - 1]

    def seconds(self) -> dict[str, float]:
        """Return seconds by part; they add up to the step's time."""
        seconds = dict.fromkeys(PARTS, 0.0)
        ends = [*self.moments[1:], self.end]
        for begin, end, part in zip(self.moments, ends, self.parts):
            seconds[part] += (end - begin) / 1e6
        return seconds


def read_steps(events: list[dict[str, Any]], rank: int, world_size: int) -> list[StepTrace]:
    """Return the steps in the events of one rank's trace, in order."""
    events = [event for event in events if event.get("ph") == "X"]
    annotations = sorted(
        (event for event in events if event.get("cat") == "user_annotation"),
        key=lambda event: event["ts"],
    )
    steps = [event for event in annotations if event["name"].startswith(STEP)]
    if not steps:
        return []
    thread = steps[0]["tid"]
    ranges = [e for e in annotations if e["tid"] == thread and _part_of(e["name"]) is not None]
    timelines = []
    for step in steps:
        inside = [e for e in ranges if step["ts"] <= e["ts"] and _end(e) <= _end(step)]
        timelines.append(Timeline(step, inside))
    traces = [StepTrace(timeline.seconds()) for timeline in timelines]
    begins = [step["ts"] for step in steps]

    def place(event: dict[str, Any]) -> tuple[StepTrace, str] | None:
        """Return the step and the part that an event belongs to; None outside of all steps."""
        index = bisect_right(begins, event["ts"]) - 1
        if index < 0 or event["ts"] >= timelines[index].end:
            return None
        # Autograd runs the backward of a device in a thread of its own.
        part = timelines[index].part_at(event["ts"]) if event["tid"] == thread else "backward"
        return traces[index], part

    for call, collective in read_collectives(events, rank, world_size):
        if (found := place(call)) is not None:
            trace, part = found
            trace.collectives.append((part, collective))
    for launch, kernel in _launches(events):
        if (found := place(launch)) is not None:
            trace, part = found
            before = trace.device_seconds.get(part, 0.0)
            trace.device_seconds[part] = before + kernel["dur"] / 1e6
    return traces


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _part_of(name: str) -> str | None:
    if name.startswith(PART):
        return name.removeprefix(PART)
    return next((part for begin, part in PIPELINE_RANGES.items() if name.startswith(begin)), None)


def _launches(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the launching call and the kernel or copy of each launch on a device."""
    calls: dict[int, dict[str, Any]] = {}
    kernels: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            calls[correlation] = event
        elif event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[correlation].append(event)
    for correlation, launched in kernels.items():
        if correlation in calls:
            for kernel in launched:
                yield calls[correlation], kernel
