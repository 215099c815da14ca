"""Walks the partitions of a dataset in order: `recsys continual`.

The model of each is built anew from the saved state, so a restarted job computes the same bits. A
process that is no rank writes packages `PACKAGES/NAME`, as ranks cannot leave their process group.
"""

import gc
import logging
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from recsys.checkpoint.files import model_of
from recsys.checkpoint.partitions import STATE, ContinualFolder, RunState, file_name
from recsys.checkpoint.run_folder import LOCK
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import Config, ContinualSettings
from recsys.data.row_source import open_rows
from recsys.data.schema import Schema, load_schema
from recsys.distributed.job import environment_without_rank
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks, sole_job
from recsys.distributed.watchdog import Watchdog
from recsys.evaluation.further_metrics import make_metrics
from recsys.serving.delta import write_delta
from recsys.serving.package import read_manifest
from recsys.storage.files import home_expanded
from recsys.storage.location import Location
from recsys.storage.output_file import check_run_folder
from recsys.training.continual.partition_run import ContinualRun, PartitionRun, format_lines
from recsys.training.continual.partitions import (
    Partition,
    PartitionRange,
    check_complete,
    list_partitions,
    next_partition,
    refused_partitions,
    require_order_of_time,
    require_rows,
    waiting_for,
)

logger = logging.getLogger(__name__)

NEWEST = "newest"
SECONDS = "seconds.jsonl"  # in the run's folder
STOP_CHECK_SECONDS = 0.2  # between checks for requests to end


def check_packages(settings: ContinualSettings, schema: Schema, run: Path) -> None:
    """Refuse bounded vocabularies of items, and a folder inside the run's, before any training."""
    if settings.packages is None:
        return
    if schema.has_bounded_items:
        raise ValueError(
            f"continual.packages is set, but '{schema.target_item}' has a vocabulary of kind "
            "bounded, which a package cannot have; leave it unset, or use kind exact"
        )
    if home_expanded(settings.packages).resolve().is_relative_to(run.resolve()):
        raise ValueError(f"continual.packages {settings.packages}: lies in {run}; name another")


def export_newest(settings: ContinualSettings, folder: ContinualFolder, state: RunState) -> None:
    """Write the package of the partition trained on last, unless it is there. On rank 0.

    A package of that name that is of another model is a ValueError.
    """
    if settings.packages is None or state.last is None:
        return
    names = [file_name(trained.name) for trained in state.trained]
    packages, run = home_expanded(settings.packages), folder.run_of(state.last.name)
    package, delta = packages / names[-1], packages / f"{names[-1]}.delta"
    if not package.exists():
        delta.unlink(missing_ok=True)  # that of an earlier run
        _export(run, package, settings.package_tables)
    elif len({read_manifest(package, verify=False).model, model_of(run)} - {None}) > 1:
        raise ValueError(
            f"{package}: is of another model than {run}, as of an earlier run; remove it and its "
            "delta, or name another folder in continual.packages"
        )
    if len(names) > 1 and (packages / names[-2]).exists() and not delta.exists():
        for partial in packages.glob(f".{delta.name}.*.partial"):  # of a job that was killed
            partial.unlink()
        logger.info("%s: %s", delta, write_delta(packages / names[-2], package, delta))
    link = packages / f".{NEWEST}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(names[-1])
    link.replace(packages / NEWEST)
    for name in names[: -settings.keep]:
        shutil.rmtree(packages / name, ignore_errors=True)


def _export(run: Path, package: Path, tables: str) -> None:
    """Run `recsys export` in a process that is no rank; if it fails, raise a ValueError."""
    package.parent.mkdir(parents=True, exist_ok=True)
    for partial in package.parent.glob(f".{package.name}.*.partial"):  # of a job that was killed
        shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "recsys.cli", "export", "--run", str(run)]
    command += ["--out", str(package), "--tables", tables]
    command += ["--compile", "false"]  # machine code holds the weights, so each delta would too
    process = subprocess.run(
        command,
        env=environment_without_rank(),
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C ends the walk, once the package is whole
    )
    if process.returncode:
        cause = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        if not package.exists():
            raise ValueError(f"{package}: export of {run} failed: {cause}")
        # An export outlives the job that was killed, and may write the package first.
        logger.warning("%s: an export of a killed job has written it: %s", package, cause)


def train_continually(
    config: Config,
    data: str,
    run: Path,
    ranks: Ranks,
    span: PartitionRange,
    follow: bool = False,
    warm_start: WarmStart | None = None,
) -> RunState:
    """Score and train on one partition after another; return what is trained. A collective.

    Raises:
        TrainingStopped: the job was asked to end; its state is saved.
        ValueError: on every rank: an input is invalid, or another job writes the folder.
    """
    make_metrics(config.metrics)
    folder = ContinualFolder(run)
    with ranks.raise_on_all_ranks():
        check_run_folder(run, data)
        _check_folder(folder, warm_start)
    with ExitStack() as stack:
        stack.enter_context(sole_job(run, ranks, run / LOCK))
        watchdog = stack.enter_context(Watchdog(ranks, config.stall_timeout))
        lockstep = stack.enter_context(Lockstep(ranks, config.checkpoint.every_seconds, watchdog))
        writers = ranks.with_new_group()
        continual = ContinualRun(
            config, data, folder, ranks, lockstep, writers, span, follow, warm_start
        )
        return _walk(continual)


def _check_folder(folder: ContinualFolder, request: WarmStart | None) -> None:
    path = folder.path
    if (path / "checkpoints").exists() or (path / "train").exists():
        raise ValueError(
            f"{path}: holds a run of `recsys train` or a dataset; choose another --out (to begin "
            f"with its state: --warm-start {path})"
        )
    state, warm_start = folder.read(), _source_run(request)
    must_match = warm_start is not None or not state.trained  # the first partition begins from it
    if (path / STATE).exists() and must_match and warm_start != state.warm_start:
        start, current = (
            f"with --warm-start {run}" if run else "without --warm-start"
            for run in (state.warm_start, warm_start)
        )
        raise ValueError(
            f"{path}: was begun {start}, and now goes on {current}; leave --warm-start as it was, "
            "or choose another --out"
        )


def _source_run(request: WarmStart | None) -> str | None:
    return None if request is None else str(request.run.resolve())


def _walk(continual: ContinualRun) -> RunState:
    """Go from partition to partition. A collective."""
    folder, ranks = continual.folder, continual.ranks
    state = ranks.on_first(_earlier_state, continual)
    num_trained = len(state.trained)
    gc.freeze()  # present objects stay, so that collecting a partition's model skips them
    if continual.follow:
        continual.lockstep.listen()
    while (partition := _next(continual, state)) is not None:
        run = PartitionRun(continual, partition, state)
        trained = run.train()
        state = replace(state, trained=(*state.trained, trained), begun=None)
        with ranks.raise_on_all_ranks():
            if ranks.is_first:
                folder.write(state)
                _prune(folder, state, continual.config.continual.keep)
                if continual.config.continual.packages is not None:
                    export_newest(continual.config.continual, folder, state)
                    run.timer.lap("export")
                run.timer.append(folder.path / SECONDS, partition.name, trained.rows)
        logger.info(f"trained on {partition.name}: {trained.rows:,} rows in {run.timer}")
        ranks.on_first(run.require_useful_scores)
        gc.collect()  # frees the model of this partition before the next is built
    if ranks.is_first and len(state.trained) > num_trained:
        print_table(format_lines(continual.config.ranking, folder.metrics()))
        logger.info("written to %s", folder.path)
    elif ranks.is_first:
        logger.info("%s: no new partition to train on", continual.data)
    return state


def _earlier_state(continual: ContinualRun) -> RunState:
    """Return the state to go on from, and check that its partitions are unchanged. On rank 0."""
    state = continual.folder.read()
    state = replace(state, warm_start=state.warm_start or _source_run(continual.warm_start))
    if state.last is None and state.begun is None:
        state = replace(state, first=continual.span.first)
    _check_trained(continual, state)
    export_newest(continual.config.continual, continual.folder, state)  # if a job was killed in it
    _log_unused_settings(continual.config)
    return state


def _log_unused_settings(config: Config) -> None:
    names = ("epochs", "patience", "patience_share", "validations_per_epoch", "best_model_by")
    default = Config()
    unused = [name for name in names if getattr(config, name) != getattr(default, name)]
    if unused:
        logger.info(
            "not used: %s; a partition has continual.passes, and the next one's scores in place of "
            "validation",
            ", ".join(unused),
        )


def _check_trained(continual: ContinualRun, state: RunState) -> None:
    """Refuse partitions whose rows changed after training on them; those removed are ignored."""
    config, root = continual.config, Location.of(continual.data)
    schema = load_schema(root, with_vocabularies=False)
    check_packages(config.continual, schema, continual.folder.path)
    for trained in state.trained:
        partition = Partition(trained.name)
        if not (root / partition.folder).exists():
            continue
        rows = open_rows(config.source, root, partition.folder, schema)
        if rows.fingerprint() != trained.fingerprint:
            raise ValueError(
                f"{root}/{partition.folder}: has changed since it was trained on (then "
                f"{trained.rows:,} rows, now {rows.num_rows:,}; {trained.fingerprint} and "
                f"{rows.fingerprint()}); bring it back, put new rows into a later partition, or "
                "start a new run in another --out"
            )


def _next(continual: ContinualRun, state: RunState) -> Partition | None:
    """Return the next partition that is whole; wait for it if asked. A collective."""
    logged, ranks = "", continual.ranks
    while True:
        partition, waits_for = ranks.on_first(_candidate, continual, state)
        if waits_for is None:
            return partition
        if waits_for != logged:
            logger.info("waiting for %s", waits_for)
            logged = waits_for
        _pause(continual.lockstep, continual.config.continual.poll_seconds)


def _candidate(continual: ContinualRun, state: RunState) -> tuple[Partition | None, str | None]:
    root = Location.of(continual.data)
    root.filesystem.invalidate_cache()
    partitions, train, span = list_partitions(root), root / "train", continual.span
    trained, today = [p.name for p in state.trained], datetime.now(UTC).replace(tzinfo=None)
    refused = refused_partitions(partitions, trained, today)
    in_order = [p for p in partitions if p.name not in refused]
    span.check(in_order)
    require_order_of_time(train, in_order)
    partition = next_partition(train, in_order, state, span, continual.config.continual.late)
    _check_begun(continual.folder, state, partition)
    if partition is None:
        refusal = _refusal(train, partitions, refused, span)
        if continual.follow:
            if span.is_over(in_order, state):
                return None, None
            cause = f" (not trained on: {refusal})" if refusal else ""
            return None, f"a further partition of {train}{cause}"
        if refusal:
            raise ValueError(refusal)
        if state.last is None:
            raise ValueError(_no_partitions(train, partitions, span))
        return None, None
    if continual.follow:
        quiet = continual.config.continual.quiet_seconds
        if (waits_for := waiting_for(root, partition, quiet)) is not None:
            return partition, waits_for
    else:
        check_complete(root, partition, partitions)
    require_rows(root, partition)
    return partition, None


def _refusal(
    train: Location, partitions: list[Partition], refused: dict[str, str], span: PartitionRange
) -> str | None:
    """Return the message of the first partition of the span that cannot be trained on."""
    names = [p.name for p in partitions if not span.ends_before(p.key)]
    first = next((name for name in names if name in refused), None)
    return first and f"{train}/{first}: {refused[first]}; rename or remove it"


def _no_partitions(train: Location, partitions: list[Partition], span: PartitionRange) -> str:
    if not partitions:
        return f"{train}: has no partition; write the rows to folders such as date=2026-11-01 in it"
    bounds = [
        f"--{name} {value}" for name, value in (("from", span.first), ("until", span.last)) if value
    ]
    names = f"{partitions[0].name} to {partitions[-1].name}"
    return f"{' '.join(bounds)}: no partition of {train}, which has {names}; set other bounds"


def _check_begun(folder: ContinualFolder, state: RunState, partition: Partition | None) -> None:
    unfinished = state.begun
    if unfinished is None or partition is None or partition.name == unfinished.name:
        return
    if folder.scores_of(unfinished.name).exists():
        raise ValueError(
            f"train/{unfinished.name}: was scored but not trained on to its end, and is gone; "
            "bring it back, or start a new run in another --out"
        )


def _pause(lockstep: Lockstep, seconds: float) -> None:
    """Wait, unless the job is asked to end. A collective."""
    lockstep.listen()
    end = time.monotonic() + seconds
    while True:
        lockstep.sync_errors()
        lockstep.raise_if_stopped()
        # All ranks use rank 0's clock, so that they leave the loop together.
        remaining = lockstep.ranks.from_first(end - time.monotonic())
        if remaining <= 0:
            return
        time.sleep(min(STOP_CHECK_SECONDS, remaining))


def _prune(folder: ContinualFolder, state: RunState, keep: int) -> None:
    """Remove the runs of all but the last partitions, and what killed jobs have left."""
    last = {file_name(trained.name) for trained in state.trained[-keep:]}
    for run in folder.partitions.iterdir():
        if run.name not in last:
            shutil.rmtree(run, ignore_errors=True)
