"""Training steps to be timed: the product's own, and those of its plain PyTorch baseline.

Batches are loaded before the clock starts, or read from files within the steps.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

from torch.profiler import ProfilerActivity, profile

from benchmarks.plain_twin import PlainSource
from benchmarks.timing.step_work import BatchCounts, part_seconds, step_flops
from recsys.build import build_job
from recsys.config import Config, load_config
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions, loader
from recsys.data.vocabularies import UnknownIds
from recsys.diagnostics.profile import label_modules
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.distributed.torchrec_internals import require_pipelined
from recsys.evaluation.evaluate import fill_bank
from recsys.training.train import training_interactions
from recsys.training.trainer import LossWatch, relaxed_gc


@dataclass(frozen=True)
class Variant:
    """A variant of training steps to time, the product or its plain PyTorch baseline.

    ranks: number of processes, one thread each unless set otherwise.
    apart: each process is a job of one rank and sends nothing: the machine's limit.
    loaded_batches: number of batches loaded beforehand and used in turn; 0: loads within steps.
    """

    name: str
    recipe: str
    data: str
    overrides: tuple[str, ...] = ()
    kind: Literal["product", "plain"] = "product"
    ranks: int = 1
    apart: bool = False
    loaded_batches: int = 16

    def config(self) -> Config:
        return load_config(self.recipe, list(self.overrides))

    def changed(self, name: str, *overrides: str, **fields: Any) -> Variant:
        """Return another variant, with more overrides; `fields` replace others."""
        return replace(self, name=name, overrides=(*self.overrides, *overrides), **fields)


class Steps(Protocol):
    """Steps that can be timed, on each rank."""

    rows: int  # rows of this rank, per step

    def counts(self) -> list[BatchCounts]:
        """Return the counts of the last step; none for the plain baseline."""

    def step(self) -> None:
        """Run one training step. A collective."""

    def profile(self, steps: int) -> dict[str, Any]:
        """Return `parts` (seconds by part of the step) and, of the product, `flops` of a step."""


def build_steps(variant: Variant, ranks: Ranks) -> Steps:
    """Build the steps of a variant. A collective."""
    if variant.kind == "plain":
        return PlainSteps(variant, ranks)
    return ProductSteps(variant, ranks)


class ProductSteps:
    """Steps of a job, as in the trainer. Building them is a collective."""

    def __init__(self, variant: Variant, ranks: Ranks) -> None:
        config = variant.config()
        self.rows = config.batch_size
        self.ranks = ranks
        self.job = build_job(config, variant.data, ranks)
        interactions = training_interactions(self.job)
        fill_bank(self.job)
        pins = ranks.device.type == "cuda"
        with closing(endless(interactions, config.num_workers, pins)) as loading:
            loaded = list(itertools.islice(loading, max(variant.loaded_batches, 1)))
        source: Iterator[Batch] = itertools.cycle(loaded)
        if not variant.loaded_batches:
            source = endless(interactions, config.num_workers, pins)
        synced = Lockstep(ranks).training_batches(source, sys.maxsize, config.accumulate_steps)
        self.batches = self.job.preparation(synced, UnknownIds(self.job.schema), 0, training=True)
        self.loss_watch = LossWatch(
            ranks, interactions.rows, config.log_every_steps, last_good=lambda: None
        )
        self.num_steps = 0
        self.batch: Batch | None = None  # batch of the last step
        self.job.model.train()

    def step(self) -> None:
        """Run one training step. A collective."""
        with relaxed_gc():
            self._step()

    def _step(self) -> None:
        job = self.job
        losses, _, batch = cast(Any, job.pipeline.progress(self.batches))
        if self.num_steps == 0:
            require_pipelined(job.model)
        if job.pipeline.has_stepped:
            job.schedule.step()
        self.num_steps, self.batch = self.num_steps + 1, batch
        error = self.loss_watch.step(self.num_steps, losses["loss"], batch.rows.positions)
        if error is not None:
            raise error

    def counts(self) -> list[BatchCounts]:
        return [] if self.batch is None else [BatchCounts.of(self.batch)]

    def profile(self, steps: int) -> dict[str, Any]:
        """Profile some steps, then count the FLOPs of another one. A collective."""
        with (
            label_modules(self.job.em3),
            profile(activities=[ProfilerActivity.CPU]) as profiler,
        ):
            begin = time.perf_counter()
            for _ in range(steps):
                self.step()
            seconds = (time.perf_counter() - begin) / steps
        parts = {name: total / steps for name, total in part_seconds(profiler.events()).items()}
        parts["other"] = max(0.0, seconds - sum(parts.values()))
        return {"parts": parts, "flops": step_flops(self.step, self.job.config.kernels)}


class PlainSteps:
    """Steps of the plain baseline; of several ranks each trains its own, without communication."""

    def __init__(self, variant: Variant, ranks: Ranks) -> None:
        config = variant.config()
        self.rows = config.batch_size
        inputs = PlainSource(config, variant.data, ranks)
        self.model = inputs.build_model()
        self.optimizers = self.model.optimizers()
        count = max(variant.loaded_batches, 1)
        self.batches = itertools.cycle(list(itertools.islice(inputs.batches(), count)))
        self.parts: list[dict[str, float]] = []

    def counts(self) -> list[BatchCounts]:
        return []

    def step(self) -> None:
        batch, moments = next(self.batches), [time.perf_counter()]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss, _ = self.model(batch)
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        for optimizer in self.optimizers:
            optimizer.step()
        moments.append(time.perf_counter())
        parts = ("forward", "backward", "optimizer")
        self.parts.append(
            {part: end - begin for part, begin, end in zip(parts, moments, moments[1:])}
        )

    def profile(self, steps: int) -> dict[str, Any]:
        for _ in range(steps):
            self.step()
        last = self.parts[-steps:]
        means = {part: sum(step[part] for step in last) / steps for part in last[0]}
        return {"parts": means}


def endless(
    interactions: Interactions, num_workers: int | Literal["auto"], pins: bool = False
) -> Generator[Batch]:
    """Yield the batches of one epoch after the other."""
    for epoch in itertools.count():
        interactions.begin(epoch)
        yield from loader(interactions, num_workers, pins)
