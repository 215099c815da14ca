"""A run's folder: decides whether a job starts it, continues it or must leave it alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.files import BEST, folders_by_age
from recsys.checkpoint.run_schema import agree_on_id_types, write_run_schema
from recsys.config import Resume, save_config
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.identity import EncoderIdentity, check_identities, write_identities
from recsys.data.filesystem import Location, recover_folder
from recsys.data.schema import vocabulary_file
from recsys.distributed.ranks import Ranks

ITEM_COUNTS = "item_counts.npy"
SKIPPED_ROWS = "skipped_rows.json"
JOB_NAME = ".job_name"
COMPARISON = "comparison.json"
TWIN = "id_only"  # folder of the ID-only twin's run
TWIN_MARK = ".has_id_only"  # marks the folder TWIN as this run's own, not an independent run


def find_start(run: Path, resume: Resume, overwrite: bool, ranks: Ranks) -> bool:
    """Return whether training continues from a checkpoint in the folder. A collective.

    A job that was restarted by torch elastic or a scheduler continues even with `overwrite`, which
    was meant for its first start.

    Raises:
        ValueError: on every rank, if the folder holds a run and `resume` is never, or holds none
            and `resume` is must.
    """
    checkpoints = run / "checkpoints"
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            for folder in [checkpoints / BEST, *_half_renamed(checkpoints)]:
                recover_folder(folder)
    # A node that came back reports no restarts, and folders on the network appear with delay.
    restarted = any(ranks.gather(was_restarted(run)))
    exists = ranks.gather(bool(folders_by_age(checkpoints)))[0]
    if restarted:
        return exists
    if resume == "must" and not exists:
        raise ValueError(f"{run}: no checkpoint to go on from, but --resume is must")
    holds_run = (run / "metrics.json").exists() or (checkpoints / BEST).exists()
    with ranks.raise_on_all_ranks():
        if ranks.is_first and not overwrite:
            if resume == "never" and (exists or holds_run):
                _refuse(run)
            if not exists and holds_run:  # only the model is left: training cannot continue
                _refuse(run)
    return exists and resume != "never" and not overwrite


def _half_renamed(checkpoints: Path) -> list[Path]:
    names = [path.name for path in checkpoints.glob(".step-*.old")]
    return [checkpoints / name.removeprefix(".").removesuffix(".old") for name in names]


def _refuse(run: Path) -> None:
    raise ValueError(f"{run}: holds a run already; choose another --out or pass --overwrite true")


def was_restarted(run: Path) -> bool:
    """Return whether this job has started before, by restart counts or by its stored name.

    The counts are those of torch elastic and Slurm.
    """
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    if any(int(os.environ.get(name) or 0) > 0 for name in counts):
        return True
    name = run / JOB_NAME
    return bool(_job_name()) and name.is_file() and name.read_text() == _job_name()


def _job_name() -> str:
    """Return torchrun's name of this job; empty where it has no name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def begin_run(
    run: Path,
    job: Job,
    item_counts: np.ndarray,  # [num_items]
    skipped_rows: dict[str, Any],
) -> None:
    """Empty the folder of an earlier run and store what this run needs unchanged. A collective.

    Raises:
        ValueError: on every rank: raw ids of a table are integers in one place, strings in another.
    """
    agree_on_id_types(job.schema, job.ranks)
    with job.ranks.raise_on_all_ranks():
        if not job.ranks.is_first:
            return
        twin = [TWIN] if (run / TWIN_MARK).exists() else []
        for part in ("checkpoints", "tensorboard", "vocabulary", *twin):
            shutil.rmtree(run / part, ignore_errors=True)
        results = ("metrics.json", COMPARISON, TWIN_MARK)
        for file in [*(run / name for name in results), *run.glob("scores_*.parquet")]:
            file.unlink(missing_ok=True)
        run.mkdir(parents=True, exist_ok=True)
        (run / JOB_NAME).write_text(_job_name())
        np.save(run / ITEM_COUNTS, item_counts)
        (run / SKIPPED_ROWS).write_text(json.dumps(skipped_rows, indent=1) + "\n")
        keep_vocabularies(run, job)
        write_run_schema(run, job.schema)


def keep_vocabularies(run: Path, job: Job) -> None:
    """Store the maps of raw ids that the run is trained with."""
    for table in job.schema.tables_with("exact"):
        file = vocabulary_file(Location.of(run), table)
        Path(file.path).parent.mkdir(parents=True, exist_ok=True)
        _exact(job, table).save(file.path)


def check_vocabularies(run: Path, job: Job) -> None:
    """Refuse data whose maps give ids other rows than the run was trained with. A collective.

    Raises:
        ValueError: on every rank; names the column.
    """
    with job.ranks.raise_on_all_ranks():
        for table in job.schema.tables_with("exact"):
            file = vocabulary_file(Location.of(run), table)
            trained = ExactVocabulary.load(file.path, job.schema.limit(table))
            if not _exact(job, table).is_extension_of(trained):
                raise ValueError(
                    f"{vocabulary_file(job.root, table)}: gives ids other rows than {file}, with "
                    f"which the run was trained; bring that map into the dataset and run `recsys "
                    f"prepare vocabulary --data {job.root}`, which only appends"
                )


def _exact(job: Job, table: str) -> ExactVocabulary:
    vocabulary = job.schema.vocabularies[table]
    assert isinstance(vocabulary, ExactVocabulary)
    return vocabulary


def encoder_identities(job: Job) -> dict[str, EncoderIdentity]:
    """Return the identities of the job's encoders by modality; stored features have none."""
    encoders = job.em3.content.encoders.items() if job.em3.content else ()
    found = {name: cast(Encoder, encoder).identity for name, encoder in encoders}
    return {name: identity for name, identity in found.items() if identity is not None}


def check_encoders(run: Path, job: Job) -> None:
    """Refuse encoders that are not those the run was trained with. A collective.

    Raises:
        ValueError: on every rank; names the modality.
    """
    with job.ranks.raise_on_all_ranks():
        check_identities(encoder_identities(job), run)


def describe_run(run: Path, job: Job, data: str) -> None:
    """Write `config.yaml`, `plan.txt`, `encoders.json` and the data's location. A collective."""
    with job.ranks.raise_on_all_ranks():
        if job.ranks.is_first:
            save_config(job.config, run / "config.yaml")
            (run / "plan.txt").write_text(f"{job.plan}\n\n{job.parameters}\n")
            write_identities(encoder_identities(job), run)
            (run / "data.txt").write_text(f"{data}\n")
