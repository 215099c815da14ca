"""The state of a job before its first step: of a new model, or of the run of `--warm-start`."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from embeddings import PretrainedFiles, load_pretrained_rows
from embeddings.pretrained import RowsOfIds
from embeddings.table_rows import TableRows
from recsys.build import Job
from recsys.checkpoint.item_content import NewRows, encode_changed_items
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_folder import EARLIER_ITEM_COUNTS, trained_counts
from recsys.checkpoint.run_schema import WARM_START, exact_maps
from recsys.checkpoint.warm_start.plan import WarmStartPlan
from recsys.checkpoint.warm_start.source import Source, WarmStart, open_source, reconciled_schema
from recsys.config import InitFromSettings
from recsys.content.item_vectors import init_projections
from recsys.data.item_frequency import ItemCounts, NumberRange
from recsys.data.schema import Schema
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.evaluation.evaluate import CheckedRows, fill_bank
from recsys.model.inputs import InputScaling
from recsys.model.tables import cold_row_rules
from recsys.ranking.generative import Generative
from recsys.ranking.settings import GenerativeSettings
from recsys.serving.retrieval.semantic_ids import codes_of_items
from recsys.storage.files import read_json, write_json
from recsys.storage.location import Location
from recsys.training.neighbour_statistics import fit_neighbours

logger = logging.getLogger(__name__)


def start_fresh(job: Job, checked: CheckedRows) -> Progress:
    """Initialise a new run: tables, projections, bank, scales, neighbours. A collective."""
    if job.em3.scaling is not None:
        job.em3.scaling.fit(checked.numbers)
    load_pretrained_tables(job)
    if job.em3.content is not None and job.store is not None:
        init_projections(job.em3.content, job.store, job.ranks, trained=checked.item_counts)
        fill_bank(job)
    fit_neighbours(job)
    set_codes(job)
    return Progress()


def set_codes(job: Job, plan: WarmStartPlan | None = None) -> None:
    """Give a generative model the codes of `ranking.semantic_ids`, if it is set. A collective.

    Codes of items that differ from those in the weights of a plan are a ValueError.
    """
    ranking, settings = job.em3.ranking, job.config.ranking
    if not isinstance(settings, GenerativeSettings) or settings.semantic_ids is None:
        return
    assert isinstance(ranking, Generative)
    trained = ranking.table.to("cpu", copy=True)
    with job.ranks.raise_on_all_ranks():
        ranking.set_codes(*codes_of_items(job, Path(settings.semantic_ids)))
        if plan is None or not plan.takes("ranking.table"):
            return
        if (items := plan.maps.get(job.schema.target_item)) is not None:
            old_rows = torch.from_numpy(items.find(0, items.num_rows))
            _check_codes(trained, ranking.table.cpu(), old_rows, settings.semantic_ids)


def _check_codes(trained: Tensor, table: Tensor, old_rows: Tensor, folder: str) -> None:
    """Raise a ValueError if known items have new codes; `old_rows` [I] is -1 for a new item."""
    trained_codes = trained[old_rows.clamp(min=0)]
    has_codes = (old_rows >= 0) & (trained_codes[:, -1] > 0) & (table[:, -1] > 0)
    # The last code, which distinguishes items that share all others, may change.
    differs = has_codes & (trained_codes[:, :-2] != table[:, :-2]).any(dim=1)
    if num_items := int(differs.sum()):
        raise ValueError(
            f"{folder}: {num_items:,} of {int(has_codes.sum()):,} items have other codes than the "
            "weights were trained with; add new items by recsys semantic-ids --codebooks, or train "
            "anew with --warm-start-skip 'ranking.*'"
        )


def load_pretrained_tables(job: Job, num_old_ids: Mapping[str, int] | None = None) -> None:
    """Write the vectors of every `embedding.tables.NAME.init_from` into its table. A collective.

    `num_old_ids` has the number of ids by exact map whose rows stay; None: all rows are written.
    """
    for name, settings in job.config.embedding.tables.items():
        source = settings.init_from
        if source is None or (num_old_ids is not None and name not in num_old_ids):
            continue
        with job.ranks.raise_on_all_ranks():
            files, rows_of_ids = _pretrained_files(job.schema, name, source)
        if num_old_ids is not None:
            if rows_of_ids is None:  # the file is by row, and has no rows of new ids
                continue
            rows_of_ids = partial(_rows_of_new_ids, rows_of_ids, num_old_ids[name])
        with job.ranks.raise_on_all_ranks():
            loaded = load_pretrained_rows(
                job.model, name, files, rows_of_ids, may_be_empty=num_old_ids is not None
            )
        logger.info(
            f"table '{name}': {loaded.num_set:,} rows set, {loaded.num_skipped:,} unknown ids "
            f"left out, from {source.path}"
        )


def _rows_of_new_ids(rows_of_ids: RowsOfIds, num_old_ids: int, ids: pa.Array) -> np.ndarray:
    """Return the rows of ids, -1 for ids that the map already had."""
    rows = rows_of_ids(ids)
    return np.where(rows < num_old_ids, -1, rows)


def _pretrained_files(
    schema: Schema, name: str, source: InitFromSettings
) -> tuple[PretrainedFiles, RowsOfIds | None]:
    """Return a table's files, and the map from their ids to rows; None if ids are rows."""
    where = f"embedding.tables.{name}.init_from"
    location = Location.of(source.path)
    paths = [file.path for file in location.files(".parquet")]
    if not paths:
        raise ValueError(
            f"{where}: {source.path}: no such Parquet file, nor a folder with *.parquet files"
        )
    settings = schema.vocabulary_of(name)
    if settings is not None and settings.kind != "exact":
        raise ValueError(
            f"{where}: column '{name}' has a vocabulary of kind {settings.kind}, in which no id "
            "has a row of its own before training; choose kind exact"
        )
    columns = pq.read_schema(paths[0], filesystem=location.arrow).names
    id_column = source.id_column or ("id" if "id" in columns else "row")
    files = PretrainedFiles(paths, location.arrow, id_column, source.vector_column, source.table)
    if settings is None or id_column == "row":  # as `export-tables` writes it
        return files, None
    return files, exact_maps(schema)[name].find


def open_warm_start(
    request: WarmStart, data: str, run: Path | None, ranks: Ranks, with_vocabularies: bool = True
) -> tuple[Source, Schema]:
    """Open the run to start from, and the schema of the data as its model reads it. A collective.

    Without vocabularies, the caller gives the schema its maps of raw ids.
    """
    source = open_source(request, run, ranks)
    with ranks.raise_on_all_ranks():
        return source, reconciled_schema(source, Location.of(data), with_vocabularies)


def start_warm(
    job: Job, run: Path, plan: WarmStartPlan, numbers: Mapping[str, NumberRange]
) -> Progress:
    """Start a run with the state that its plan takes over; initialise the rest. A collective."""
    progress = load_source(job, plan)
    fit_to_rows(job, plan, numbers)
    counts = counts_before(job, plan)
    if job.schema.target_item in plan.maps:
        job.ranks.on_first(counts.save, run / EARLIER_ITEM_COUNTS)
    job.ranks.on_first(describe_start, run, plan)
    return progress


def load_source(job: Job, plan: WarmStartPlan, fills_bank: bool = True) -> Progress:
    """Load the state that the plan takes over; read no data rows, write no file. A collective."""
    source = plan.source
    load_pretrained_tables(job)  # the plan then replaces rows that the other run has
    if job.averages is not None:
        job.averages.copy_weights()  # the plan then replaces averages that the other run has
    plan.apply(job)
    fill_all_cold_rows(job)
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
            init_projections(content, job.store, job.ranks, new, counts_before(job, plan))
        if not fills_bank:
            return progress
        if plan.items is None:
            fill_bank(job)
        else:
            with job.averaged():  # by the weights that the run predicts with
                run, manifest = source.request.run, source.model.manifest
                encode_changed_items(job, run, manifest, new_item_rows(job, plan))
    return progress


def counts_before(job: Job, plan: WarmStartPlan) -> ItemCounts:
    """Return the other run's training rows by item of this job; may be empty. A collective."""
    with job.ranks.raise_on_all_ranks():
        if (rows := plan.maps.get(job.schema.target_item)) is None:
            return ItemCounts.sum_of([])
        counts = trained_counts(plan.source.request.run, plan.source.schema.item_id_limit)
        if rows.is_identity or job.schema.has_bounded_items:  # counted by raw id
            return counts
        items = rows.new_rows(counts.items)
        return ItemCounts.sum_of([ItemCounts(items[items >= 0], counts.counts[items >= 0])])


def new_item_rows(job: Job, plan: WarmStartPlan) -> NewRows | None:
    """Return the map from item rows of the other run to those of the job; None if all are equal."""
    assert plan.items is not None
    is_same = plan.items.is_identity or job.schema.has_bounded_items  # known by raw id
    return None if is_same else plan.items.new_rows


def fit_to_rows(
    job: Job, plan: WarmStartPlan, numbers: Mapping[str, NumberRange], earlier: Sequence[str] = ()
) -> None:
    """Fit scales, neighbours, codes and new rows, once the rows are scored. A collective.

    Neighbours are fitted to the rows in `earlier` folders, too.
    """
    maps = exact_maps(job.schema)
    num_old_ids = {
        table: len(old)
        for table, old in exact_maps(plan.source.schema).items()
        if table in maps and len(maps[table]) > len(old) and maps[table].is_extension_of(old)
    }
    scaling = job.em3.scaling
    if scaling is not None and not _takes_raw_numbers(scaling, plan):
        scaling.fit(numbers)
    fit_neighbours(job, earlier)
    set_codes(job, plan)
    if job.averages is not None and job.averages.tables:
        with job.averaged():  # steps average these rows with the weights
            load_pretrained_tables(job, num_old_ids)
    load_pretrained_tables(job, num_old_ids)
    for table, (rule, result) in fill_all_cold_rows(job).items():
        plan.differences.add(f"table '{table}'", f"new_rows: {rule}", result)


def fill_cold_rows(job: Job) -> dict[str, tuple[str, str]]:
    """Set rows that no step has trained by their table's `new_rows`. A collective.

    `zero` is 0, `mean` that of trained rows; moments stay zero. Returns rule and result by table.
    """
    filled: dict[str, tuple[str, str]] = {}
    for table, rule in cold_row_rules(job.config, job.schema).items():
        rows = TableRows(job.model, table, job.ranks.group)
        mean, num_trained = rows.mean()
        result = "initial values, as no row was trained before"
        if num_trained:
            rows.fill_untrained(torch.zeros_like(mean) if rule == "zero" else mean)
            result = "zeros" if rule == "zero" else f"the mean of {num_trained:,} trained rows"
        filled[table] = rule, result
    return filled


def fill_all_cold_rows(job: Job) -> dict[str, tuple[str, str]]:
    """Call `fill_cold_rows` for averaged tables, if any, and for the weights. A collective."""
    if job.averages is not None and job.averages.tables:
        with job.averaged():
            fill_cold_rows(job)
    return fill_cold_rows(job)


def refill_cold_rows(job: Job) -> None:
    """Call `fill_cold_rows` during training, and log the results. A collective."""
    for table, (_, result) in fill_cold_rows(job).items():
        logger.info("table '%s': rows without training: %s", table, result)


def _takes_raw_numbers(scaling: InputScaling, plan: WarmStartPlan) -> bool:
    """Return whether the ranking model that is taken over was trained on unscaled numbers."""
    if not any(name.startswith("ranking.") for name in plan.weights):
        return False
    if plan.takes("scaling.fits"):
        return float(scaling.fits) == 0
    return "model.scaling.fits" not in plan.source.model.entries


def check_begun_from(run: Path, request: WarmStart | None) -> None:
    """Raise a ValueError unless `run` was begun from the run that `request` names."""
    if request is None:
        return
    file = run / WARM_START
    stored = read_json(file)["request"] if file.exists() else None
    if stored != _as_json(request):
        raise ValueError(
            f"{file}: this run was begun {f'with {stored}' if stored else 'without --warm-start'}, "
            f"not with {_as_json(request)}; leave --warm-start as it was, or choose another --out"
        )


def _as_json(request: WarmStart) -> dict[str, object]:
    plain: dict[str, object] = json.loads(json.dumps(asdict(request), default=str))
    return plain | {"run": str(request.run.resolve())}


def describe_start(run: Path, plan: WarmStartPlan) -> None:
    """Print, and write to the run, what was taken over and what differed."""
    content = {
        "request": _as_json(plan.source.request),
        "checkpoint": plan.source.model.folder.name,
        "step": plan.source.model.step,
        "tensors": len(plan.tensors),
        "differences": [row._asdict() for row in plan.differences.reconciled],
    }
    write_json(run / WARM_START, content, indent=1)
    print_table(str(plan))
