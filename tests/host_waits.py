"""Where a training step would wait for a GPU, found on CPU: by file, line and operation.

The step runs the branches for GPUs. Operators whose result has a size or value that the host must
know are waits; so are tensors made of Python numbers on the device, and those that go to the host.
Batches are built and prepared on the host: of that only `Tensor.cpu` counts. A graph captured by
torch.compile is one launch; its operators run one by one, so that waits inside of it are seen.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from embeddings import table_sharders
from embeddings.host import _Host
from recsys.build import Job
from recsys.model.precision import compile_dense_modules, compiled_methods

ROOT = Path(__file__).parents[1]
OWN_FOLDERS = tuple(f"{ROOT / name}/" for name in ("recsys", "embeddings"))

aten, fbgemm = torch.ops.aten, torch.ops.fbgemm
# Operators whose result's size depends on values, or whose checks read them.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.equal,
}
FREE = (
    *("empty", "new_empty", "detach", "_local_scalar", "lift_fresh"),
    *("promote_types", "result_type", "scalar_tensor", "_record_function"),
)
TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist}


class HostWaits(TorchDispatchMode):
    """Counts waits by call site while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()
        self.launches = 0
        self.logits: list[Tensor] = []  # of each step
        self.is_paused = self.is_in_graph = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # torch.compile would run uncompiled in a mode that does not say so

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.is_paused:
            self.launches += not self.is_in_graph and not _is_free(func)
            if _waits(func, args, kwargs):
                self.add(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **kwargs)

    def one_launch(self, graph: Any, example_inputs: Any) -> Any:
        """Compile a graph, for AOTAutograd, to a call that counts as one launch."""

        def run(*inputs: Any) -> Any:
            self.launches += not self.is_paused
            was_in_graph, self.is_in_graph = self.is_in_graph, True
            try:
                with _disable_current_modes(), self:
                    return graph(*inputs)
            finally:
                self.is_in_graph = was_in_graph

        return make_boxed_func(run)

    def add(self, operation: str) -> None:
        if site := _call_site():
            self.sites[f"{site}: {operation}"] += 1


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    packet = func.overloadpacket
    if packet in WAITING:
        return True
    if packet in (aten.index, aten._unsafe_index):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if packet in (aten.index_put, aten.index_put_, aten._index_put_impl_):
        # A single value is written by masked_fill.
        is_mask = any(index is not None and index.dtype == torch.bool for index in args[1])
        return is_mask and args[2].numel() > 1
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet is aten.segment_reduce:
        return not kwargs.get("unsafe", False)
    if packet is fbgemm.dense_to_jagged:
        return len(args) < 3 and kwargs.get("total_L") is None
    return False


def _is_free(func: Any) -> bool:
    """Return whether an operator launches no kernel: it makes a view, or memory without values."""
    aliases = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or func.overloadpacket.__name__.startswith(FREE)


class _ToHost(TorchFunctionMode):
    """Sees what dispatch does not on CPU: copies to the host, and constants to the device."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        goes_to_host = func in TO_HOST or (func is Tensor.to and "cpu" in args[1:2])
        is_constant = func is torch.tensor and kwargs.get("device") is not None
        # Of a tensor on the host these are free, but for `cpu`, which says that it is on a GPU.
        if func is Tensor.cpu or ((goes_to_host or is_constant) and not self.waits.is_paused):
            self.waits.add(func.__name__)
        return func(*args, **kwargs)


def _call_site() -> str:
    """Return the innermost line of the product that runs, or of TorchRec if it is its own code."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OWN_FOLDERS):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        if "/fbgemm_gpu/" in file:
            return ""  # its lookups for CPU read values that those for GPUs do not
        if "/torchrec/distributed/" in file:
            return f"torchrec/{file.partition('/torchrec/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@contextmanager
def gpu_branches() -> Iterator[None]:
    """Run on CPU what a GPU would run."""
    with (
        patch.object(_Host, "device", "none"),
        patch.object(table_sharders, "look_up_as_bags", lambda module: None),
    ):
        yield


def _compile(job: Job, waits: HostWaits) -> None:
    backend = aot_autograd(fw_compiler=waits.one_launch, bw_compiler=waits.one_launch)
    compile_dense_modules(job.em3, job.ranks.device, backend)

    def outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            with _disable_current_modes(), _pop_mode_temporarily():
                return function(*inputs)

        return call

    if getattr(job.em3.ranking, "reads_host_lengths", False):
        for module, name in compiled_methods(job.em3.ranking):
            setattr(module, name, outside(getattr(module, name)))
        for module in job.em3.modules():
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = outside(module._compiled_call_impl)
    else:
        job.em3.scoring.compiled = outside(job.em3.scoring.compiled)
    if job.em3.content is not None and job.em3.content.compiled is not None:
        job.em3.content.compiled = outside(job.em3.content.compiled)


def audited_steps(
    job: Job, batches: Iterator[Any], warm_up: int = 2, is_compiled: bool = False
) -> HostWaits:
    """Train with the batches, and return the waits and launches of the steps after `warm_up`."""
    waits = HostWaits()
    waits.is_paused = True
    if is_compiled:
        _compile(job, waits)

    def fed() -> Iterator[Any]:
        while True:
            was_paused, waits.is_paused = waits.is_paused, True
            batch = next(batches, None)
            waits.is_paused = was_paused
            if batch is None:
                return
            yield batch

    source = fed()
    job.model.train()
    with _ToHost(waits), waits:
        for number in itertools.count():
            waits.is_paused = number < warm_up
            try:
                _, logits, _ = job.pipeline.progress(source)
            except StopIteration:
                break
            waits.is_paused = True
            waits.logits.append(logits.detach().clone())
            if job.pipeline.has_stepped:
                job.schedule.step()
    return waits
