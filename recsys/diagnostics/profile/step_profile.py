"""Profiles training steps: the time of each part, and the bytes that collectives send.

A few steps of the loop run under `torch.profiler`, after as many that are only timed, so that the
report shows the overhead of the profiler. While it records, hooks mark the modules of the model;
TorchRec's pipeline marks its own stages. Nothing is hooked before or after.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from recsys.data.filesystem import write_whole
from recsys.diagnostics.profile.report import RankProfile, format_profile, scalars, summary
from recsys.diagnostics.profile.step_trace import PART, read_steps
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.model.em3 import EM3

FIRST_STEPS = 3  # steps of a loop that fill the pipeline and warm caches; not measured
PROFILE, TRACE = "profile.json", "profile_trace.json.gz"


class StepProfile:
    """Profiles some steps of a training loop; every rank makes one.

    Rank 0 then prints a table, writes `profile.json` and its own trace, which Perfetto and
    TensorBoard open, into the run's folder, and passes the table's values to `write`.

    Args:
        em3: the model inside its wrappers.
        ranks: the ranks of the job.
        steps: number of steps to profile; 0: none.
        folder: the run's folder.
        say: prints a text.
        write: stores values by name, such as a tracker; None: they are not stored.

    Example::

        profile = StepProfile(job.em3, job.ranks, 10, run)
        with profile:  # as often as the loop is left and entered again
            for batch in batches:
                pipeline.progress(batches)
                profile.step()
    """

    def __init__(
        self,
        em3: EM3,
        ranks: Ranks,
        steps: int,
        folder: Path,
        say: Callable[[str], None] = print_table,
        write: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Keep the parts; profiling starts when a loop is entered."""
        self.em3, self.ranks, self.steps, self.folder = em3, ranks, steps, folder
        self.say, self.write = say, write
        self.plain_seconds: list[float] = []  # durations of steps without profiler
        self._done = steps == 0
        self._profiler: profile | None = None  # None outside of a loop
        self._marks = ExitStack()  # removes the marks of modules
        self._has_said_why = False
        self._wait = 0  # steps of this loop before the profiler starts
        self._steps_of_loop = 0
        self._began = 0.0  # start of this step

    def __enter__(self) -> StepProfile:
        """Start the profiler for a loop, unless all steps are profiled."""
        if self._done:
            return self
        self._wait = FIRST_STEPS + self.steps - len(self.plain_seconds)
        activities = [ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # The first step under the profiler includes its start-up and is not recorded.
        phases = schedule(wait=self._wait, warmup=1, active=self.steps, repeat=1)
        self._profiler = profile(
            activities=activities, schedule=phases, on_trace_ready=self._finish, record_shapes=True
        )
        self._profiler.start()
        self._steps_of_loop, self._began = 0, time.perf_counter()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """End the recording when its loop ends. A collective, unless an error ended the loop."""
        if self._profiler is not None:
            if error is None:
                self._say_why_fewer()
            if error is not None or self._num_recorded == 0:
                self._profiler.on_trace_ready = None
            self._stop()

    def _say_why_fewer(self) -> None:
        """Print, once, why an ended loop had fewer steps than were to be profiled."""
        if self._has_said_why or not self.ranks.is_first:
            return
        self._has_said_why = True
        self.say(
            f"profile_steps: {self._num_recorded} of {self.steps} steps are profiled here: "
            f"training paused after {self._steps_of_loop} steps, for a validation or a checkpoint, "
            f"and needs {self._wait + 1 + self.steps} in a row (the first of them warm up, or are "
            "timed without the profiler)"
        )

    @property
    def _num_recorded(self) -> int:
        return max(0, self._steps_of_loop - self._wait - 1)

    def step(self) -> None:
        """Mark the end of a step. A collective after the last recorded step."""
        if self._profiler is None:
            return
        self._steps_of_loop += 1
        if FIRST_STEPS < self._steps_of_loop <= self._wait:
            self.plain_seconds.append(time.perf_counter() - self._began)
        if self._steps_of_loop == self._wait:
            self._marks = mark_parts(self.em3)
        self._profiler.step()
        if self._done:
            self._stop()
        self._began = time.perf_counter()

    def _stop(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._marks.close()
        self._profiler = None

    def _finish(self, profiler: profile) -> None:
        """Gather and report the recorded steps. A collective."""
        self._done = True
        with self.ranks.raise_on_all_ranks(), tempfile.TemporaryDirectory() as scratch:
            path = (self.folder if self.ranks.is_first else Path(scratch)) / TRACE
            profiler.export_chrome_trace(str(path))
            with gzip.open(path, "rt") as file:
                events = json.load(file)["traceEvents"]
            # One more step may have begun when the loop ended.
            steps = read_steps(events, self.ranks.rank, self.ranks.world_size)
            steps = steps[: self._num_recorded]
        profiles = self.ranks.gather(RankProfile(self.plain_seconds, steps))
        if self.ranks.is_first:
            report = summary(profiles, self.ranks.device.type)
            write_whole(self.folder / PROFILE, json.dumps(report, indent=2) + "\n")
            self.say(format_profile(report))
            if self.write is not None:
                self.write(scalars(report))


def mark_parts(em3: EM3) -> ExitStack:
    """Mark the calls of the model's modules as parts of the step, until the result is closed."""
    marks = ExitStack()
    for module, part in _parts_of(em3):
        _mark_forward(module, part, marks)
    if em3.content is not None:
        for encoder in em3.content.encoders.values():
            _mark_method(encoder, "encode", "encoders", marks)
    return marks


def _parts_of(em3: EM3) -> list[tuple[nn.Module, str]]:
    parts: list[tuple[nn.Module, str]] = []
    for collection in (em3.embedding_bags, em3.embeddings):
        if collection is not None:
            # Ids are sent before the call; looked-up vectors come back within it.
            parts.append((collection, "output dist"))
            lookups: Any = getattr(collection, "_lookups", [])
            parts += [(lookup, "lookup") for lookup in lookups]
    parts.append((em3.read_ids, "output dist"))  # waits for the vectors
    if em3.content is not None:
        parts += [(em3.content, "content"), (em3.content.fusion, "fusion")]
    return [*parts, (em3.ranking, "ranking"), (em3.losses, "losses")]


def _mark_forward(module: nn.Module, part: str, marks: ExitStack) -> None:
    open_ranges: list[record_function] = []

    def begin(*_: Any) -> None:
        open_ranges.append(record_function(PART + part))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    marks.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
    marks.callback(module.register_forward_hook(end, always_call=True).remove)


def _mark_method(module: nn.Module, name: str, part: str, marks: ExitStack) -> None:
    method = getattr(module, name)

    def marked(*arguments: Any, **named: Any) -> Any:
        with record_function(PART + part):
            return method(*arguments, **named)

    setattr(module, name, marked)
    marks.callback(delattr, module, name)
