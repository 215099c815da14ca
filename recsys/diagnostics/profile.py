"""Profile training steps with `torch.profiler`, with the parts of the model named in records."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.model.em3 import EM3

logger = logging.getLogger(__name__)

FIRST_STEPS = 3  # unrecorded steps of a loop that fill the pipeline and warm caches
TRACE = "profile_trace.json.gz"
PRINTED_ROWS = 40


class StepProfile:
    """Profiles some steps of a training loop on rank 0, and writes a trace for Perfetto."""

    def __init__(self, em3: EM3, ranks: Ranks, steps: int, folder: Path) -> None:
        self.em3, self.steps, self.folder = em3, steps, folder
        self._is_cuda = ranks.device.type == "cuda"
        self._done = steps == 0 or not ranks.is_first
        self._profiler: profile | None = None  # None outside of a loop
        self._hooks = ExitStack()  # removes the hooks
        self._has_printed_reason, self._steps_of_loop = False, 0

    def __enter__(self) -> Self:
        if self._done:
            return self
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._is_cuda
        # The profiler starts up in the first active step, so that one is a warm-up.
        phases = schedule(wait=FIRST_STEPS, warmup=1, active=self.steps, repeat=1)
        kinds: dict[str, Any] = {"activities": activities, "schedule": phases}
        self._profiler = profile(**kinds, on_trace_ready=self._report)
        self._profiler.start()
        self._steps_of_loop = 0
        return self

    def step(self) -> None:
        if self._profiler is None:
            return
        self._steps_of_loop += 1
        if self._steps_of_loop == FIRST_STEPS:
            self._hooks = label_modules(self.em3)
        self._profiler.step()
        if self._done:
            self._stop()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._profiler is None:
            return
        recorded = max(0, self._steps_of_loop - FIRST_STEPS - 1)
        if error is None and not self._has_printed_reason:
            self._has_printed_reason = True
            print_table(
                f"profile_steps: {recorded} of {self.steps} steps are profiled here: training "
                f"paused after {self._steps_of_loop} steps, for a validation or a checkpoint; it "
                f"needs {FIRST_STEPS + 1 + self.steps} in a row, of which the first "
                f"{FIRST_STEPS + 1} warm up"
            )
        if error is not None or not recorded:
            self._profiler.on_trace_ready = None
        self._stop()

    def _stop(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._hooks.close()
        self._profiler = None

    def _report(self, profiler: profile) -> None:
        self._done = True
        key = "device_time_total" if self._is_cuda else "cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=PRINTED_ROWS)
        print_table(f"profile of steps on rank 0; `## name ##` are parts of a step\n{table}")
        try:
            profiler.export_chrome_trace(str(self.folder / TRACE))
        except OSError as error:  # training goes on without the trace
            logger.warning("%s: cannot be written (%s)", self.folder / TRACE, error)


def label_modules(em3: EM3) -> ExitStack:
    """Name the modules in the profiler's records, such as `## encoders ##`, until closed."""
    hooks = ExitStack()
    modules: list[tuple[nn.Module, str]] = [(em3.ranking, "ranking"), (em3.losses, "losses")]
    for collection in (em3.embedding_bags, em3.embeddings):
        if collection is not None:
            # Ids are exchanged before this forward call, looked-up vectors within it.
            modules.append((collection, "output dist"))
            lookups: Any = getattr(collection, "_lookups", [])
            modules += [(lookup, "lookup") for lookup in lookups]
    modules.append((em3.id_reader, "output dist"))  # waits for the vectors
    if em3.content is not None:
        modules += [(em3.content, "content"), (em3.content.fusion, "fusion")]
        encoder: Any
        for encoder in em3.content.encoders.values():
            # `record_function` as a decorator opens a range at each call.
            encoder.encode = record_function("## encoders ##")(encoder.encode)
            hooks.callback(delattr, encoder, "encode")
    for module, label in modules:
        _label_forward(module, label, hooks)
    return hooks


def _label_forward(module: nn.Module, label: str, hooks: ExitStack) -> None:
    open_ranges: list[record_function] = []

    def begin(*_: Any) -> None:
        open_ranges.append(record_function(f"## {label} ##"))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
    hooks.callback(module.register_forward_hook(end, always_call=True).remove)
