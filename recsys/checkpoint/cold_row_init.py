"""First values of table rows that no training step has updated, by their table's `new_rows`.

`zero` is 0, `mean` the mean of the trained rows. Moments of the rows stay zero.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from embeddings.table_rows import TableRows
from recsys.build import Job
from recsys.model.tables import cold_row_rules

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilledRows:
    """Rows of a table that got values by a rule."""

    rule: str  # zero or mean
    num_trained: int  # trained rows, whose mean the others have

    def __str__(self) -> str:
        if not self.num_trained:
            return "initial values, as no row was trained before"
        return "zeros" if self.rule == "zero" else f"the mean of {self.num_trained:,} trained rows"


def fill_cold_rows(job: Job) -> dict[str, FilledRows]:
    """Apply the rules of all tables, and return what was filled, by table. A collective."""
    filled = {}
    for table, rule in cold_row_rules(job.config, job.schema).items():
        rows = TableRows(job.model, table, job.ranks.group)
        mean, num_trained = rows.mean()
        filled[table] = FilledRows(rule, num_trained)
        if num_trained:
            rows.fill_untrained(torch.zeros_like(mean) if rule == "zero" else mean)
    return filled


def refill_cold_rows(job: Job) -> None:
    """Apply the rules in training. A collective."""
    for table, filled in fill_cold_rows(job).items():
        logger.info("table '%s': rows without training: %s", table, filled)


def require_table_state(job: Job, checkpoint: Path | None) -> None:
    """Raise a ValueError for a table with a rule if no optimizer state tells its trained rows."""
    if checkpoint is None and (rules := cold_row_rules(job.config, job.schema)):
        raise ValueError(
            f"embedding.tables.{next(iter(rules))}.new_rows: the run has its best model only, "
            "without the optimizer state that tells trained rows from others; bring back its last "
            "checkpoint, or train anew with --overwrite"
        )
