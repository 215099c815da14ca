"""A run's folder: decide whether a job starts it, continues it or must leave it alone."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.files import BEST, file_digest, folders_to_continue, model_of
from recsys.checkpoint.item_content import FOLDER, keep_item_content
from recsys.checkpoint.partitions import STATE
from recsys.checkpoint.run_schema import WARM_START, agree_on_id_types, exact_maps, write_run_schema
from recsys.config import Resume, save_config
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.identity import EncoderIdentity, check_identities, write_identities
from recsys.data.item_frequency import ItemCounts
from recsys.data.schema import vocabulary_file
from recsys.distributed.job import JobName, restarts
from recsys.distributed.ranks import Ranks
from recsys.storage.files import (
    atomic_file,
    atomic_write,
    read_json,
    recover_folder,
    regular_file,
    write_json,
)
from recsys.storage.location import Location

ITEM_COUNTS = "item_counts.npy"
EARLIER_ITEM_COUNTS = "item_counts_before.npy"  # of the runs started from, by this run's rows
SKIPPED_ROWS = "skipped_rows.json"
LOCK = ".lock"  # held by the job that writes the folder
METRICS = "metrics.json"
JOB = ".job.json"  # the job that began the run and, once it has finished, hashes of its results
REPLACED = ".checkpoints.replaced"
COMPARISON = "comparison.json"
BASELINE = "id_only"  # folder of the ID-only baseline's run
BASELINE_MARKER = ".has_id_only"  # marks the folder BASELINE as this run's own


def find_start(run: Path, resume: Resume, overwrite: bool, ranks: Ranks) -> bool:
    """Return whether training continues from a checkpoint in the folder. A collective.

    A restart continues even with `overwrite`. A `resume` that does not fit is a ValueError.
    """
    checkpoints = run / "checkpoints"
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            if (run / STATE).exists():
                raise ValueError(f"{run}: holds a continual run; choose another --out")
            if (run / "train").exists():  # its schema.yaml would be overwritten
                raise ValueError(f"{run}: holds a dataset; choose another --out")
            recover_checkpoints(run)
    # Rank 0 decides, as network folders appear with delay; a returned node reports no restarts.
    restarted = any(ranks.gather(was_restarted(run)))
    finished, folders = (run / METRICS).exists(), folders_to_continue(checkpoints)
    is_only_best = [folder.name for folder in folders] == [BEST]
    exists = bool(folders) and not (finished and is_only_best)
    finished, exists = ranks.gather((finished, exists))[0]
    if restarted:
        return exists
    if resume == "must" and overwrite:
        raise ValueError(
            "--resume must continues a run and --overwrite replaces it; give one of them"
        )
    if resume == "must" and not exists:
        raise ValueError(
            f"{run}: no checkpoint, but --resume is must; choose auto, or correct --out"
        )
    if overwrite:
        return False
    if (finished or exists) and (resume == "never" or not exists):  # or only its model is left
        raise ValueError(f"{run}: holds a run already; choose another --out or pass --overwrite")
    return exists


def recover_checkpoints(run: Path) -> None:
    """Restore the folders that a killed job was replacing."""
    checkpoints = run / "checkpoints"
    names = [path.name for path in checkpoints.glob(".step-*.old")]
    names = [name.removeprefix(".").removesuffix(".old") for name in names]
    for name in [BEST, *names]:
        recover_folder(checkpoints / name)


def was_restarted(run: Path) -> bool:
    """Return whether this job has begun the run in an attempt before this one."""
    job = JobName.from_environment()
    elastic, slurm = restarts("TORCHELASTIC") > 0, restarts("SLURM") > 0
    if job == JobName():  # a launcher that counts but gives no name
        return elastic or slurm
    try:
        stored = read_json(run / JOB)
        first_job, finished = JobName(stored["torchrun"], stored["slurm"]), bool(stored["finished"])
    except (ValueError, KeyError, TypeError):
        return False
    # A node that came back reports no restarts, nor does a new job with a finished job's name.
    if job.torchrun and job.torchrun == first_job.torchrun and (elastic or not finished):
        return True
    return slurm and job.slurm == first_job.slurm


def _write_job(run: Path, finished: bool, **results: str | None) -> None:
    content = {**asdict(JobName.from_environment()), "finished": finished, **results}
    write_json(run / JOB, content)


def finish_run(run: Path) -> None:
    """Record that the job ended without an error: a later job of its name is not its restart."""
    _write_job(run, finished=True, **_results(run))


def check_metrics(run: Path) -> None:
    """Raise a ValueError unless metrics are of the run's current best model."""
    stored, results = read_json(run / JOB) if (run / JOB).exists() else {}, _results(run)
    if not isinstance(stored, dict) or any(
        stored.get(key, results[key]) != results[key] for key in results
    ):
        raise ValueError(
            f"{run}/metrics.json: not what training wrote when it ended, or {run}/checkpoints/best "
            "has changed since; let the training that goes on end, or bring the file back"
        )


def _results(run: Path) -> dict[str, str | None]:
    return {"metrics": file_digest(run / METRICS), "model": model_of(run)}


def begin_run(run: Path, job: Job, item_counts: ItemCounts, skipped_rows: dict[str, Any]) -> None:
    """Empty the folder of an earlier run and store the fixed files of this run. A collective."""
    agree_on_id_types(job.schema, job.ranks)
    with job.ranks.raise_on_all_ranks():
        if not job.ranks.is_first:
            return
        _empty(run)
        run.mkdir(parents=True, exist_ok=True)
        _write_job(run, finished=False)
        item_counts.save(run / ITEM_COUNTS)  # rank 0 has the counts of all ranks
        write_json(run / SKIPPED_ROWS, skipped_rows, indent=1)
        keep_vocabularies(run, job)
        write_run_schema(run, job.schema)


def _empty(run: Path) -> None:
    """Remove an earlier run; `metrics.json` goes first, so that a killed job can begin again."""
    (run / METRICS).unlink(missing_ok=True)
    shutil.rmtree(run / REPLACED, ignore_errors=True)
    if (run / "checkpoints").exists():
        (run / "checkpoints").rename(run / REPLACED)
    baseline = [BASELINE] if (run / BASELINE_MARKER).exists() else []
    for name in (REPLACED, "tensorboard", "vocabulary", FOLDER, *baseline):
        shutil.rmtree(run / name, ignore_errors=True)
    files = (COMPARISON, BASELINE_MARKER, JOB, WARM_START, EARLIER_ITEM_COUNTS)
    for pattern in (*files, "scores_*.parquet", "evaluation_*.json", "baselines_*.json"):
        for file in run.glob(pattern):
            file.unlink(missing_ok=True)


def read_item_counts(run: Path, num_items: int | None, name: str = ITEM_COUNTS) -> ItemCounts:
    """Read the training rows of each item, at most `num_items`; damage is a ValueError."""
    file = run / name
    try:
        stored = ItemCounts.load(regular_file(file))
        items, counts = stored.items, stored.counts
        is_counts = items.dtype.kind == counts.dtype.kind == "i" and items.shape == counts.shape
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); train anew") from error
    is_limited = num_items is not None and len(items) > 0
    if not is_counts or (is_limited and not 0 <= items.min() <= items.max() < num_items):
        kind = "raw ids of items" if num_items is None else f"the {num_items:,} items of the schema"
        raise ValueError(f"{file}: is not of {kind}; train anew")
    if (np.diff(items) <= 0).any() or (counts < 0).any():
        raise ValueError(f"{file}: damaged (items do not rise, or a count is negative); train anew")
    return stored


def trained_counts(run: Path, num_items: int | None) -> ItemCounts:
    """Return the training rows of each item, in a run and in those it was started from."""
    has_earlier = (run / EARLIER_ITEM_COUNTS).exists()
    names = [ITEM_COUNTS, EARLIER_ITEM_COUNTS] if has_earlier else [ITEM_COUNTS]
    return ItemCounts.sum_of([read_item_counts(run, num_items, name) for name in names])


def keep_vocabularies(run: Path, job: Job) -> None:
    """Store the maps of raw ids that the run uses."""
    for table, vocabulary in exact_maps(job.schema).items():
        file = vocabulary_file(Location.of(run), table)
        Path(file.path).parent.mkdir(parents=True, exist_ok=True)
        vocabulary.save(file.path)


def check_vocabularies(run: Path, job: Job) -> None:
    """Raise a ValueError for data whose maps give ids other rows than in training. A collective."""
    with job.ranks.raise_on_all_ranks():
        for table, vocabulary in exact_maps(job.schema).items():
            file = vocabulary_file(Location.of(run), table)
            trained = ExactVocabulary.load(file.path, job.schema.limit(table))
            if not vocabulary.is_extension_of(trained):
                raise ValueError(
                    f"{vocabulary_file(job.root, table)}: gives ids other rows than {file}, with "
                    f"which the run was trained; bring that map into the dataset, where "
                    "`recsys prepare vocabulary` appends new ids if the table has room"
                )


def encoder_identities(job: Job) -> dict[str, EncoderIdentity]:
    """Return the identities of the job's encoders by modality; stored features have none."""
    encoders = job.em3.content.encoders.items() if job.em3.content else ()
    identities = {name: cast(Encoder, encoder).identity for name, encoder in encoders}
    return {name: identity for name, identity in identities.items() if identity is not None}


def check_encoders(run: Path, job: Job) -> None:
    """Raise a ValueError for encoders that the run was not trained with. A collective."""
    with job.ranks.raise_on_all_ranks():
        check_identities(encoder_identities(job), run)


def describe_run(run: Path, job: Job, data: str) -> None:
    """Write `config.yaml`, `plan.txt`, `encoders.json` and the data's location."""
    with atomic_file(run / "config.yaml") as partial:
        save_config(job.config, partial)
    atomic_write(run / "plan.txt", f"{job.plan}\n\n{job.parameters}\n")
    write_identities(encoder_identities(job), run)
    keep_item_content(run, job)
    atomic_write(run / "data.txt", f"{data}\n")
