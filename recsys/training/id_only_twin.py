"""`recsys train --compare id_only`: measure the gain from content against the model without it.

The twin is trained after the run, by the same ranks on the same data, in a folder inside the run's.
It continues where it stopped, as the run does, and is removed when the run is overwritten.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from recsys.checkpoint.files import folders_by_age
from recsys.checkpoint.run_folder import COMPARISON, LOCK, TWIN, TWIN_MARK, Resume, finish_run
from recsys.config import Config
from recsys.config.checks import validate
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks, sole_job
from recsys.evaluation.compare import compare_runs, format_comparison, write_comparison
from recsys.storage.output_file import check_run_folder
from recsys.training.train import check_best, train, train_locked

logger = logging.getLogger(__name__)


def id_only_twin(config: Config) -> Config:
    """Return the same configuration without content and without the parts that need it.

    New rows that the run makes of content get what that rule gives without it: the mean.

    Raises:
        ValueError: the configuration has no content, or is not valid without it.
    """
    if config.content == "none":
        raise ValueError(
            "--compare id_only: the run has no content (content: none), so it is its own ID-only "
            "twin; leave --compare out or configure content"
        )
    tables = {
        name: replace(table, new_rows="mean") if table.new_rows == "content" else table
        for name, table in config.embedding.tables.items()
    }
    twin = replace(
        config,
        content="none",
        contrastive=replace(config.contrastive, weight=0.0),
        embedding=replace(config.embedding, tables=tables),
    )
    validate(twin)
    return twin


def train_with_twin(
    config: Config,
    data: str,
    run: Path,
    ranks: Ranks,
    overwrite: bool = False,
    resume: Resume = "auto",
) -> None:
    """Train a run, then its twin in `RUN/id_only`, and compare them on the test split.

    Arguments are those of `train`; the same command continues whichever of the two is unfinished.
    The report of `compare_runs`
    is printed and written to `RUN/comparison.json`. A collective.

    Raises:
        TrainingStopped: the job was asked to end; its state is saved.
        ValueError: on every rank: as in `train`; the run has no twin; its folder is not a twin's.
    """
    with ranks.raise_on_all_ranks():
        check_run_folder(run, data)
    with sole_job(run, ranks, run / LOCK):
        metrics = _train_both(config, data, run, ranks, overwrite, resume)
        finish_run(run, ranks)
    check_best(metrics, config, data, run)


def _train_both(
    config: Config, data: str, run: Path, ranks: Ranks, overwrite: bool, resume: Resume
) -> dict[str, Any]:
    """Train the run and its twin, compare them, return the run's metrics. A collective."""
    twin, folder, mark = id_only_twin(config), run / TWIN, run / TWIN_MARK
    with ranks.raise_on_all_ranks():
        if ranks.is_first and folder.exists() and not mark.exists():
            raise ValueError(
                f"{folder}: was not made as the twin of {run}, and would be replaced; move it or "
                "choose another --out"
            )
    metrics = train_locked(config, data, run, ranks, overwrite, resume)
    gc.collect()  # the first model is no longer needed, and its modules refer to each other
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            mark.touch()
    logger.info("training the ID-only twin in %s", folder)
    # A best model without a checkpoint to continue from may be replaced: the folder is the twin's.
    anew = ranks.gather(not folders_by_age(folder / "checkpoints"))[0]
    train(twin, data, folder, ranks, overwrite=anew)
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            report = compare_runs([folder, run], "test")
            write_comparison(report, run / COMPARISON)
            print_table(format_comparison(report))
            logger.info("written to %s", run / COMPARISON)
    return metrics
