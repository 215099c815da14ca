"""Evaluate and predict with a finished run. Shapes: N rows of a file or row group, C labels."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys.build import Job, build_job
from recsys.checkpoint.files import model_of
from recsys.checkpoint.manager import load_best
from recsys.checkpoint.run_folder import check_encoders, check_vocabularies, read_item_counts
from recsys.checkpoint.run_schema import add_new_items, load_run_schema, schema_of_data
from recsys.config import SourceSettings, load_config
from recsys.data.interactions import Interactions
from recsys.data.parquet.file import READ_ERRORS, open_parquet
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks, sole_job
from recsys.distributed.watchdog import Watchdog
from recsys.evaluation.evaluate import evaluate_split, format_evaluation, score
from recsys.evaluation.forward_pass import require_finite, rows_per_batch
from recsys.evaluation.scores import scores_file
from recsys.model.losses import predictions
from recsys.model.tables import scoring_config
from recsys.storage.files import atomic_file, regular_file, write_json
from recsys.storage.location import Location
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)


def data_of(run: Path, data: str | None) -> str:
    """Return the dataset to read: `data`, or by default the run's training data."""
    return data or regular_file(run / "data.txt").read_text().strip()


def load_run(
    run: Path, data: str | None, ranks: Ranks, device: str, changed: Sequence[str] = ()
) -> Job:
    """Return the job of a run's best model; `changed` are arguments of settings. A collective."""
    with ranks.raise_on_all_ranks():
        if not (run / "metrics.json").is_file():
            raise ValueError(f"{run}: holds no finished run (metrics.json); train it first")
        config = load_config(run / "config.yaml", ["--device", device, *changed])
        config = scoring_config(config, ranks.device.type)
        data = data_of(run, data)
        schema = schema_of_data(run, Location.of(data), ranks)
        train_folder = add_new_items(run, schema, Location.of(data))
    job = build_job(config, data, ranks, schema, train_folder)
    check_vocabularies(run, job)
    check_encoders(run, job)
    load_best(job, run)
    return job


def evaluate(run: Path, data: str | None, split: str, ranks: Ranks, device: str) -> dict[str, Any]:
    """Evaluate a split, print the metrics, and write them and the scores. A collective.

    Metrics go to `RUN/evaluation_SPLIT.json`; if that is impossible, print them and raise.
    """
    with ranks.raise_on_all_ranks():
        scores = scores_file(run, split)
        root = Location.of(data_of(run, data))
        is_parquet = load_config(run / "config.yaml").source.name == SourceSettings().name
        if is_parquet and not (root / split).files(".parquet"):  # user-defined sources need none
            raise ValueError(f"{root / split}: no *.parquet files; correct --split or --data")
        model = model_of(run)  # read before loading, as training may replace the model
    job = load_run(run, data, ranks, device)
    can_store = ranks.gather(_can_store(run))[0]
    with ranks.raise_on_all_ranks():
        counts = read_item_counts(run, job.schema.item_id_limit)
    scores_to = scores if can_store else None
    with Watchdog(ranks, job.config.stall_timeout) as watchdog:
        lockstep = Lockstep(ranks, watchdog=watchdog)
        report = evaluate_split(
            job, split, counts, lockstep, True, scores_to, model, shows_skipped=True
        )
    file = run / f"evaluation_{split}.json"
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            text = format_evaluation(report, job.config.ranking, job.config.metrics)
            print_table(f"{split}\n{text}")
            is_of_run = str(root) == str(Location.of(data_of(run, None)))
            if split == "valid" and is_of_run and job.em3.neighbours is not None:
                logger.warning(
                    "warning: training fitted the blend of model and neighbours to these rows; in "
                    "metrics.json, each user's rows are scored by a blend fitted to other users"
                )
            if not can_store:
                raise ValueError(f"{file}: {run} cannot be written to; the result is printed only")
            write_json(file, report, indent=2)
    return report


def _can_store(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def predict(
    run: Path, inputs: list[str], out: Path, data: str | None, ranks: Ranks, device: str
) -> None:
    """Write the input rows, in their order, with one prediction per label. A collective.

    A prediction is a probability, or a number for a numeric label; null for a skipped row.
    """
    with ranks.raise_on_all_ranks():
        files = [file for name in inputs for file in _parquet_files(name)]
        check_output(out, [*map(Location.of, inputs), *files])
        trained = load_run_schema(run, with_vocabularies=False)
        _check_columns(files, prediction_names(trained))
    with sole_job(out, ranks, out.with_name(f".{out.name}.lock")):
        _predict(run, files, out, data, ranks, device)


def _predict(
    run: Path, files: list[Location], out: Path, data: str | None, ranks: Ranks, device: str
) -> None:
    """Write predictions to a file that this job has locked. A collective."""
    job = load_run(run, data, ranks, device)
    with ranks.raise_on_all_ranks():
        rows = ParquetRows(files, job.schema, False, job.config.on_bad_row)
        build = job.batch_builder(with_labels=False, with_content=False)
        size = rows_per_batch(job.config.batch_size)
        interactions = Interactions(rows, build, size, ranks.rank, ranks.world_size)
    unknown = UnknownIds(job.schema)
    with Watchdog(ranks, job.config.stall_timeout) as watchdog:
        scored = score(job, interactions, Lockstep(ranks, watchdog=watchdog), unknown)
    if (line := format_unknown("input", unknown.totals(ranks.group))) is not None:
        logger.info(line)
    if job.config.on_bad_row == "skip":
        rows.skipped(ranks, "input")
    ranks.on_first(require_finite, scored, rows)
    values = torch.full((rows.num_rows, scored["logits"].shape[1]), torch.nan)
    values[scored["positions"]] = predictions(scored["logits"], job.schema.label_losses)
    ranks.on_first(_write, files, prediction_names(job.schema), values.numpy(), out)
    logger.info("%s predictions written to %s", f"{rows.num_rows:,}", out)


def _parquet_files(name: str) -> list[Location]:
    files = Location.of(name).files(".parquet")
    if not files:
        raise ValueError(f"{name}: no such Parquet file, nor a folder with *.parquet files")
    return files


def prediction_names(schema: Schema) -> list[str]:
    """Return the name of each label's column of predictions."""
    return [f"prediction_{label}" for label in schema.of_kind("label")]


def _check_columns(files: list[Location], names: list[str]) -> None:
    """Raise a ValueError if files differ in columns, or have a column of predictions already."""
    first: pa.Schema | None = None
    for file in files:
        with open_parquet(file) as parquet:
            columns = parquet.schema_arrow
        for name in names:
            if name in columns.names:
                raise ValueError(f"{file}: has a column '{name}' already; drop or rename it")
        if (first := first or columns) != columns:
            raise ValueError(
                f"{file}: its columns differ from those of {files[0]}; predict them into separate "
                "files"
            )


def _write(files: list[Location], names: list[str], values: np.ndarray, out: Path) -> None:
    """Write the rows of the files with further columns of these names [C] and values [N, C]."""
    out.parent.mkdir(parents=True, exist_ok=True)
    writer: pq.ParquetWriter | None = None
    start = 0
    with atomic_file(out) as partial:
        for table in _row_groups(files):
            end = start + table.num_rows
            for name, column in zip(names, values[start:end].T, strict=True):
                table = table.append_column(name, pa.array(column, mask=np.isnan(column)))
            start = end
            writer = writer or pq.ParquetWriter(partial, table.schema, write_page_checksum=True)
            writer.write_table(table)
        assert writer is not None
        writer.close()


def _row_groups(files: list[Location]) -> Iterator[pa.Table]:
    for file in files:
        with open_parquet(file) as parquet:
            for index in range(parquet.num_row_groups):
                try:
                    table = parquet.read_row_group(index)
                except READ_ERRORS as error:
                    raise ValueError(
                        f"{file}: row group {index} cannot be read ({error}), nor written again "
                        "with predictions; leave the file out or write it again"
                    ) from error
                yield table
