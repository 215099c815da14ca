"""Tables that begin every epoch anew: `embedding.reset_every_epoch`.

Models with ID tables are at their best after one epoch, and fall once they see rows of data a
second time: a table has learned the labels of these rows, and the dense weights learn to trust it
(one-epoch phenomenon, Zhang et al. 2022, arXiv 2209.06053). With initial rows in each epoch the
dense weights train on for several, over tables that have seen each row once (multi-epoch learning,
Liu et al. 2023, arXiv 2305.19531). Half-way through an epoch tables are half trained, so that
validations there are lower.
"""

from __future__ import annotations

import logging

import torch

from embeddings.new_rows.table_rows import BLOCK_ROWS
from embeddings.row_reset import RowReset
from recsys.build import Job
from recsys.checkpoint.progress import Progress
from recsys.config import Config
from recsys.model.tables import table_configs

logger = logging.getLogger(__name__)


def check_reset(config: Config, is_warm: bool) -> None:
    """Refuse a reset that would discard rows which a run took over from another one.

    Args:
        config: settings of the run.
        is_warm: the run began with the state of another one.

    Raises:
        ValueError: it did, has several epochs and resets its tables.
    """
    if is_warm and config.embedding.reset_every_epoch and config.epochs > 1:
        raise ValueError(
            "embedding.reset_every_epoch is true: the second epoch would discard the rows that "
            f"--warm-start takes over; set it to false, or epochs ({config.epochs}) to 1"
        )


def reset_is_due(config: Config, progress: Progress) -> bool:
    """Return whether the next step is the first of an epoch that begins with initial rows."""
    is_at_start = not progress.batches and not progress.stages
    return config.embedding.reset_every_epoch and progress.epoch > 0 and is_at_start


def reset_tables(job: Job, epoch: int) -> None:
    """Reset the rows of all trained tables, their optimizer state and their averages, on all ranks.

    The rows depend on seed and epoch alone: a run that continues at the start of an epoch resets
    its tables to the same bits.
    """
    tables = [table for table in table_configs(job.config, job.schema) if not table.frozen]
    reset = RowReset(job.model, tables, job.config.seed + epoch)
    for table in tables:
        for start in range(0, table.num_embeddings, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, table.num_embeddings)
            reset(table.name, torch.arange(start, stop))
    if job.averages is not None:
        job.averages.restart_tables()
    if job.ranks.is_first:
        logger.info("tables %s begin anew", ", ".join(table.name for table in tables))
