"""Training: begin or continue a run, and write its results; the loop is in `trainer`."""

import gc
import logging
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recsys.build import Job, build_job, check_columns
from recsys.checkpoint import run_folder
from recsys.checkpoint.files import BEST, folders_by_age, model_of
from recsys.checkpoint.manager import Checkpoints, load_best
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_folder import BASELINE, BASELINE_MARKER, COMPARISON, LOCK, SKIPPED_ROWS
from recsys.checkpoint.run_schema import schema_of_data
from recsys.checkpoint.warm_start.plan import plan_warm_start
from recsys.checkpoint.warm_start.source import Source, WarmStart
from recsys.config import Config, Resume, softmax_settings
from recsys.config.load import validate
from recsys.data.all_positions import all_positions
from recsys.data.interactions import Interactions
from recsys.data.row_source import RowSource, open_rows
from recsys.data.schema import Schema, format_growth, load_schema
from recsys.distributed.lockstep import Lockstep, TrainingStopped
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks, sole_job
from recsys.distributed.watchdog import Watchdog
from recsys.evaluation.compare import compare_runs, format_comparison
from recsys.evaluation.evaluate import check_data, evaluate_split, format_evaluation
from recsys.evaluation.further_metrics import make_metrics
from recsys.evaluation.model_selection import require_useful, slack_for
from recsys.evaluation.scores import scores_file
from recsys.model.tables import cold_row_rules
from recsys.ranking.settings import TwoTowerSettings
from recsys.storage.files import read_json, write_json
from recsys.storage.location import Location
from recsys.storage.output_file import check_run_folder
from recsys.training.initial_state import check_begun_from, open_warm_start, start_fresh, start_warm
from recsys.training.trackers import Reporter
from recsys.training.trainer import Trainer

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers", "peft", "torchx")


def versions() -> dict[str, str]:
    """Return the installed versions of packages that results depend on."""
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def train(
    config: Config,
    data: str,
    run: Path,
    ranks: Ranks,
    overwrite: bool = False,
    resume: Resume = "auto",
    warm_start: WarmStart | None = None,
    baseline: Config | None = None,
) -> dict[str, Any]:
    """Train, keep the best model, and return the content of `metrics.json`. A collective.

    A run with a checkpoint continues unless `overwrite` is set. `resume` "never" refuses such a
    run, "must" any other. A new run may begin with the state of `warm_start`, and be compared on
    test with a `baseline`, which is trained in `RUN/id_only`.

    Raises:
        TrainingStopped: the job was asked to end; its state is saved.
        ValueError: on every rank: an input is invalid, or the written model's scores are useless.
    """
    with ranks.raise_on_all_ranks():
        check_run_folder(run, data)
    with sole_job(run, ranks, run / LOCK):
        with ranks.raise_on_all_ranks():
            is_kept = (run / BASELINE).exists() and not (run / BASELINE_MARKER).exists()
            if baseline is not None and ranks.is_first and is_kept:
                raise ValueError(
                    f"{run / BASELINE}: was not made as the baseline of {run}, and would be "
                    "replaced; move it or choose another --out"
                )
        make_metrics(config.metrics)  # invalid settings are reported before any work is done
        resumes = run_folder.find_start(run, resume, overwrite, ranks)
        metrics = _train_locked(config, data, run, ranks, resumes, warm_start)
        if baseline is not None:
            _compare_with_baseline(baseline, data, run, ranks)
        ranks.on_first(run_folder.finish_run, run)
    check_best(metrics, config, data, run)
    return metrics


def _train_locked(
    config: Config, data: str, run: Path, ranks: Ranks, resumes: bool, warm_start: WarmStart | None
) -> dict[str, Any]:
    """Train as `train` does, in a folder that this job has locked. A collective."""
    with (
        Watchdog(ranks, config.stall_timeout) as watchdog,
        Lockstep(ranks, config.checkpoint.every_seconds, watchdog) as lockstep,
    ):
        source: Source | None = None
        schema: Schema | None = None
        if resumes:
            with ranks.raise_on_all_ranks():
                check_begun_from(run, warm_start)
                schema = schema_of_data(run, Location.of(data), ranks, resumes)
        elif warm_start is not None:
            source, schema = open_warm_start(warm_start, data, run, ranks)
        # Checked before items are encoded, which may take long.
        check_columns(config.source, config.on_bad_row, data, ranks, schema)
        job = build_job(config, data, ranks, schema)
        for line in format_growth(job.schema) if ranks.is_first and not resumes else ():
            logger.info(line)
        trainer = open_run(job, run, data, resumes, lockstep, source)
        try:
            trainer.train()
            return _finish(trainer)
        except TrainingStopped as stopped:
            raise TrainingStopped(
                f"asked to end after step {trainer.progress.steps}; the state is in "
                f"{trainer.checkpoints.last_good}, and the same command goes on from there"
            ) from stopped
        finally:
            trainer.reporter.close()
            trainer.checkpoints.close()


def open_run(
    job: Job, run: Path, data: str, resumes: bool, lockstep: Lockstep, source: Source | None
) -> Trainer:
    """Begin the run, or restore the job's state where the run stopped. A collective."""
    interactions = training_interactions(job)
    checkpoints = Checkpoints(job, run, interactions.rows.fingerprint())
    progress: Progress | None = None
    if resumes:
        run_folder.check_vocabularies(run, job)
        run_folder.check_encoders(run, job)
        progress = checkpoints.restore()
        rules = cold_row_rules(job.config, job.schema)
        if progress is not None and checkpoints.last_good is None and rules:
            raise ValueError(
                f"embedding.tables.{next(iter(rules))}.new_rows: the run has its best model only, "
                "without the optimizer state that tells trained rows from others; bring back its "
                "last checkpoint, or train anew with --overwrite"
            )
    if progress is None:
        plan = None if source is None else plan_warm_start(job, source)  # before files are written
        checked = check_data(job)
        run_folder.begin_run(run, job, checked.item_counts, checked.skipped)
    job.ranks.on_first(run_folder.describe_run, run, job, data)
    item_counts = run_folder.read_item_counts(run, job.schema.item_id_limit)
    if job.ranks.is_first:
        print_table(f"{job.plan}\n\n{job.parameters}\n")
    reporter = Reporter(job, run, progress or Progress())
    if progress is None:
        if plan is None:
            progress = start_fresh(job, checked)
        else:
            progress = start_warm(job, run, plan, checked.numbers)
    else:
        logger.info("going on after step %d from %s", progress.steps, checkpoints.last_good or BEST)
    return Trainer(job, run, interactions, checkpoints, lockstep, reporter, progress, item_counts)


def training_interactions(job: Job, is_shuffled: bool = True) -> Interactions:
    """Return this rank's share of the training rows. A collective."""
    config, ranks, settings = job.config, job.ranks, job.config.ranking
    with ranks.raise_on_all_ranks():
        rows = job.rows("train")
    if isinstance(settings, TwoTowerSettings) and settings.target_positions == "all":
        rows = all_positions(rows, settings.recent_items, ranks)
    with ranks.raise_on_all_ranks():
        build, seed = job.batch_builder(), config.seed if is_shuffled else None
        interactions = Interactions(
            rows, build, config.batch_size, ranks.rank, ranks.world_size, seed
        )
        count = config.validations_per_epoch
        ends = [interactions.batches_until(index, count) for index in range(count + 1)]
        job.end_decay(config.epochs * job.updates_between(ends))
    return interactions


def training_metrics(progress: Progress, ranks: Ranks) -> dict[str, Any]:
    """Return the entries of `metrics.json` on the training itself."""
    values: dict[str, Any] = {
        "samples_per_second": progress.samples / progress.seconds,
        "seconds": progress.seconds,
        "steps": progress.steps,
        "peak_bytes": progress.peak_bytes,
    }
    counts = {"ids": progress.ids, "vocabularies": progress.vocabularies}
    values |= {name: totals for name, totals in counts.items() if totals}
    return {"train": values, "world_size": ranks.world_size, "versions": versions()}


def _finish(trainer: Trainer) -> dict[str, Any]:
    """Test the best model and write `metrics.json`. A collective."""
    job, run, progress = trainer.job, trainer.run, trainer.progress
    best = load_best(job, run)
    if best["step"] != progress.best_step:
        raise ValueError(
            f"{run}/checkpoints/best: is of step {best['step']}, but the best of this run is of "
            f"step {progress.best_step}; train on with more epochs, or anew with --overwrite"
        )
    with job.ranks.raise_on_all_ranks():
        model = model_of(run)
    counts, file = trainer.item_counts, scores_file(run, "test")
    test = evaluate_split(job, "test", counts, trainer.lockstep, True, scores_to=file, model=model)
    metrics = {"valid": progress.best, "test": test, **training_metrics(progress, job.ranks)}
    if job.config.on_bad_row == "skip":
        metrics["skipped_rows"] = read_json(run / SKIPPED_ROWS)
    with job.ranks.raise_on_all_ranks():  # no rank leaves before the result is written
        if job.ranks.is_first:
            write_json(run / "metrics.json", metrics, indent=2)
            tables = format_evaluation(test, job.config.ranking, job.config.metrics)
            print_table(f"test, model of step {progress.best_step}\n{tables}")
    trainer.reporter.evaluation("test", progress.steps, test)
    logger.info("written to %s", run)
    return metrics


def check_best(metrics: dict[str, Any], config: Config, data: str, run: Path) -> None:
    """Raise a ValueError on all ranks if the best model's predictions are useless."""
    if softmax_settings(config.ranking) is not None:  # its scores are no probabilities
        return
    root, consequence = Location.of(data), "Checkpoints and metrics.json are kept"

    def rows_of(split: str) -> RowSource:
        return open_rows(config.source, root, split, load_schema(root), config.on_bad_row)

    valid, test = metrics["valid"], metrics["test"]
    require_useful(valid, f"{run}, validation", partial(rows_of, "train"), consequence)
    slack = slack_for(test.get("num_samples", 0))
    require_useful(test, f"{run}, test", partial(rows_of, "test"), consequence, slack)


def id_only_baseline(config: Config) -> Config:
    """Return the configuration without content and what needs it; a ValueError if it has none."""
    if config.content == "none":
        raise ValueError(
            "--compare id_only: the run has no content (content: none), so it is its own ID-only "
            "baseline; leave --compare out or configure content"
        )
    baseline = replace(config, content="none", contrastive=replace(config.contrastive, weight=0.0))
    validate(baseline)
    return baseline


def _compare_with_baseline(config: Config, data: str, run: Path, ranks: Ranks) -> None:
    """Train the baseline of a run, or go on with it, and compare both. A collective."""
    gc.collect()  # frees the first model, whose modules form reference cycles
    folder = run / BASELINE
    ranks.on_first((run / BASELINE_MARKER).touch)
    logger.info("training the ID-only baseline in %s", folder)
    # A best model without a checkpoint to continue from may be replaced: the folder is the run's.
    is_new = ranks.gather(not folders_by_age(folder / "checkpoints"))[0]
    train(config, data, folder, ranks, overwrite=is_new)
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            report = compare_runs([folder, run], "test")
            write_json(run / COMPARISON, report, indent=2)
            print_table(format_comparison(report))
            logger.info("written to %s", run / COMPARISON)
