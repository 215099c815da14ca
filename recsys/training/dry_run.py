"""`recsys train --dry-run`: build everything, take one step, and write no run."""

import itertools
import logging
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch

from recsys.build import Job, build_job, check_columns
from recsys.checkpoint.warm_start.plan import plan_warm_start
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import Config
from recsys.content.item_vectors import init_projections
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions, loader
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.distributed.torchrec_internals import require_pipelined
from recsys.distributed.watchdog import Watchdog
from recsys.evaluation.evaluate import check_data, split_interactions
from recsys.evaluation.forward_pass import forward_pass
from recsys.training.initial_state import load_pretrained_tables, load_source, open_warm_start
from recsys.training.train import training_interactions
from recsys.training.trainer import peak_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DryRun:
    """Measurements of a dry run, over all ranks."""

    losses: dict[str, float]  # by part, the mean over the ranks
    rows: int  # rows of the step
    scored_rows: int
    build_seconds: float
    step_seconds: float
    evaluation_seconds: float
    peak_bytes: list[int]  # by rank: of the GPU, or resident in the process

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        ranks = f"{len(self.peak_bytes)} rank{'s' if len(self.peak_bytes) > 1 else ''}"
        peak = max(self.peak_bytes) / 2**30
        return (
            f"dry run: one training step of {self.rows:,} rows on {ranks} ran in "
            f"{self.step_seconds:.2f} s ({losses}), and {self.scored_rows:,} validation rows were "
            f"scored in {self.evaluation_seconds:.2f} s; building took {self.build_seconds:.1f} s, "
            f"the peak of memory is {peak:.2f} GiB on a rank. Nothing was written but caches of "
            "items"
        )


def dry_run(config: Config, data: str, ranks: Ranks, warm_start: WarmStart | None = None) -> DryRun:
    """Build a job, train on one batch per rank, score one, and print the result. A collective.

    A setting, data or a run of `warm_start` that cannot be used is a ValueError on every rank.
    """
    with (
        Watchdog(ranks, config.stall_timeout) as watchdog,
        Lockstep(ranks, watchdog=watchdog) as lockstep,
    ):
        times = [time.perf_counter()]
        source, schema = None, None
        if warm_start is not None:
            source, schema = open_warm_start(warm_start, data, None, ranks)
        check_columns(config.source, config.on_bad_row, data, ranks, schema)
        job = build_job(config, data, ranks, schema)
        interactions = training_interactions(job)
        plan = None if source is None else plan_warm_start(job, source)
        first, *_ = interactions.slices
        interactions.rows.keep(first.window, interactions.shuffle_seed)  # the step reads it, too
        checked = check_data(job, opened={"train": interactions.rows})
        if job.em3.scaling is not None:
            job.em3.scaling.fit(checked.numbers)
        if ranks.is_first:
            print_table(f"{job.plan}\n\n{job.parameters}\n\n{plan or ''}")
        # The steps whose time does not grow with the catalogue.
        if plan is not None:
            load_source(job, plan, fills_bank=False)
        else:
            load_pretrained_tables(job)
            if job.em3.content is not None and job.store is not None:
                init_projections(job.em3.content, job.store, ranks)
        times.append(time.perf_counter())
        with watchdog.armed():
            losses, rows = _train_step(job, interactions, lockstep)
            times.append(time.perf_counter())
            scored_rows = _score_batch(job, lockstep)
            times.append(time.perf_counter())
    peaks, rows_of_ranks, scored = zip(*ranks.gather((peak_bytes(ranks.device), rows, scored_rows)))
    loss_values = ranks.gather(losses)
    means = {name: sum(local[name] for local in loss_values) / len(loss_values) for name in losses}
    build, step, score = (end - begin for begin, end in itertools.pairwise(times))
    result = DryRun(means, sum(rows_of_ranks), sum(scored), build, step, score, list(peaks))
    logger.info("%s", result)
    return result


def _train_step(
    job: Job, interactions: Interactions, lockstep: Lockstep
) -> tuple[dict[str, float], int]:
    """Take one step; return this rank's losses and rows. A collective."""
    job.model.train()
    job.pipeline.begin(1)
    with closing(_first_batch(interactions, job.ranks.device)) as source:
        batches = lockstep.training_batches(source, count=1)
        prepared = job.preparation(batches, UnknownIds(job.schema), first_step=0, training=True)
        losses, _, batch = next(job.pipeline.outputs(prepared))
        require_pipelined(job.model)
    values = {name: float(value) for name, value in losses.items()}  # waits for a GPU
    rows = batch.rows.positions[batch.rows.positions >= 0].cpu().numpy()
    with job.ranks.raise_on_all_ranks():
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss of the first step is {values['loss']} on rank {job.ranks.rank}, on rows "
                f"between {interactions.rows.describe_range(rows)}; look at these rows and at the "
                "scale of dense columns and features"
            )
    return values, len(rows)


def _score_batch(job: Job, lockstep: Lockstep) -> int:
    """Score a batch of the validation split; return its rows. A collective."""
    interactions = split_interactions(job, "valid")
    with closing(_first_batch(interactions, job.ranks.device)) as source, torch.no_grad():
        _, logits, batch = next(forward_pass(job, source, lockstep))
    logits.float().sum().item()  # waits for a GPU
    return int((batch.rows.positions >= 0).sum())


def _first_batch(interactions: Interactions, device: torch.device) -> Generator[Batch]:
    with closing(loader(interactions, 0, device.type == "cuda")) as batches:
        yield from itertools.islice(batches, 1)
