"""A new run that begins with the state of another one: `recsys train --warm-start RUN`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.cold_row_init import counts_before, fill_cold_rows, keep_counts_before
from recsys.checkpoint.item_content import encode_changed_items
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_schema import WARM_START
from recsys.checkpoint.warm_start.comparison import reconciled_schema
from recsys.checkpoint.warm_start.plan import WarmStartPlan
from recsys.checkpoint.warm_start.source import Differences, Source, WarmStart, open_source
from recsys.content.projection_start import start_projections
from recsys.data.number_ranges import NumberRange
from recsys.data.schema import Schema
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.evaluation.evaluate import fill_bank
from recsys.model.input_scaling import InputScaling
from recsys.storage.files import read_json, write_whole
from recsys.storage.location import Location
from recsys.training.initial_state import load_pretrained_tables
from recsys.training.neighbour_statistics import fit_neighbours

logger = logging.getLogger(__name__)

OpenedWarmStart = tuple[Source, Differences]


def open_warm_start(
    request: WarmStart, data: str, run: Path, ranks: Ranks, with_vocabularies: bool = True
) -> tuple[OpenedWarmStart, Schema]:
    """Open the run to start from, and the schema of the data as its model reads it. A collective.

    Without vocabularies, the caller gives the schema its maps of raw ids.
    """
    source, differences = open_source(request, run, ranks), Differences()
    with ranks.raise_on_all_ranks():
        schema = reconciled_schema(source, Location.of(data), differences, with_vocabularies)
    return (source, differences), schema


def start_warm(
    job: Job, run: Path, plan: WarmStartPlan, numbers: Mapping[str, NumberRange]
) -> Progress:
    """Begin a run with what its plan takes over; the rest as in any new run. A collective."""
    progress = take_over(job, plan)
    fit_to_rows(job, plan, numbers)
    keep_counts_before(run, job, plan)
    describe_start(run, job.ranks, plan)
    return progress


def take_over(job: Job, plan: WarmStartPlan) -> Progress:
    """Fill the job with what its plan takes over; read no row, and write nothing. A collective."""
    source = plan.source
    load_pretrained_tables(job)  # rows that the other run has are replaced by its own
    plan.apply(job)
    progress = Progress(
        steps_before=source.model.progress.age,
        table_steps_before=source.optimizer.progress.table_steps
        if source.optimizer is not None and plan.tables_with_state
        else 0,
    )
    job.set_step(progress.age, progress.dense_steps)
    job.model.fused_optimizer.set_optimizer_step(progress.table_steps)
    content = job.em3.content
    if content is not None and job.store is not None:
        weights = {name: f"content.projections.{name}.weight" for name in content.projections}
        if new := [name for name, weight in weights.items() if not plan.takes(weight)]:
            start_projections(content, job.store, job.ranks, new, counts_before(job, plan))
        if plan.items is None:
            fill_bank(job)
        else:
            with job.averaged():  # as predictions by the run do
                run, manifest = source.request.run, source.model.manifest
                encode_changed_items(job, run, manifest, new_item_rows(job, plan))
    return progress


def new_item_rows(
    job: Job, plan: WarmStartPlan
) -> Callable[[np.ndarray], np.ndarray] | None:  # [N] -> [N]
    """Return the map from rows of items of the plan to rows of the job; None if they are equal."""
    assert plan.items is not None
    is_same = plan.items.is_identity or job.schema.has_bounded_items  # known by raw id
    return None if is_same else plan.items.new_rows


def fit_to_rows(
    job: Job,
    plan: WarmStartPlan,
    numbers: Mapping[str, NumberRange],
    earlier_folders: Sequence[str] = (),
) -> None:
    """Fit what training does not learn to the job's training rows, once scored. A collective.

    Statistics of neighbours are of the rows in `earlier_folders`, too.
    """
    _load_pretrained_rows_of_new_ids(job, plan)
    scaling = job.em3.scaling
    if scaling is not None and not _takes_raw_numbers(scaling, plan):
        scaling.fit(numbers)
    fit_neighbours(job, earlier_folders)
    for table, filled in fill_cold_rows(job, counts_before(job, plan)).items():
        plan.differences.add(f"table '{table}'", f"new_rows: {filled.rule}", str(filled))


def _load_pretrained_rows_of_new_ids(job: Job, plan: WarmStartPlan) -> None:
    """Write the vectors of `init_from` for ids that an exact map has got since. A collective."""
    num_old_ids = {}
    for table in job.schema.tables_with("exact"):
        previous = plan.source.schema.vocabularies.get(table)
        current = job.schema.vocabularies.get(table)
        if not isinstance(previous, ExactVocabulary) or not isinstance(current, ExactVocabulary):
            continue
        if len(current) > len(previous) and current.is_extension_of(previous):
            num_old_ids[table] = len(previous)
    load_pretrained_tables(job, num_old_ids)


def _takes_raw_numbers(scaling: InputScaling, plan: WarmStartPlan) -> bool:
    """Return whether the ranking model that is taken over reads all numbers as they are."""
    if not plan.takes_part("ranking."):
        return False
    if plan.takes("scaling.fits"):
        return float(scaling.fits) == 0
    return "model.scaling.fits" not in plan.source.model.entries


def check_begun_from(run: Path, request: WarmStart | None) -> None:
    """Raise a ValueError for a run that was not begun from the run that is asked for."""
    if request is None:
        return
    file = run / WARM_START
    stored = read_json(file)["request"] if file.exists() else None
    if stored != _plain(request):
        raise ValueError(
            f"{file}: this run was begun {f'with {stored}' if stored else 'without --warm-start'}, "
            f"not with {_plain(request)}; leave --warm-start as it was, or choose another --out"
        )


def _plain(request: WarmStart) -> dict[str, object]:
    plain: dict[str, object] = json.loads(json.dumps(asdict(request), default=str))
    return plain | {"run": str(request.run.resolve())}


def describe_start(run: Path, ranks: Ranks, plan: WarmStartPlan) -> None:
    """Print and keep what was taken over and what differed. A collective."""
    model = plan.source.model
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            content = {
                "request": _plain(plan.source.request),
                "checkpoint": model.folder.name,
                "step": model.manifest["step"],
                "tensors": len(plan.tensors),
                "differences": [asdict(difference) for difference in plan.differences.reconciled],
            }
            write_whole(run / WARM_START, json.dumps(content, indent=1) + "\n")
            print_table(
                f"warm start from {model.folder}, step {model.manifest['step']:,}: "
                f"{len(plan.tensors):,} tensors\n{plan.differences}\n"
            )
