"""Check, before the first step, that the validation split can choose the best model.

AUC needs rows of both labels, GAUC a user with rows of both, and recall and NDCG a positive row and
a catalogue of more items than the depth.

Shapes: N rows of a chunk.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from recsys.build import Job
from recsys.data.item_frequency import rows_that_count
from recsys.data.parquet.values import RAW_GROUP
from recsys.data.schema import Schema
from recsys.distributed.gather import gather_rows
from recsys.distributed.ranks import Ranks
from recsys.evaluation.model_selection import METRICS, RETRIEVAL_DEPTH, needs_search
from recsys.evaluation.retrieval import catalogue_of


class ValidationLabels:
    """Counts the first label's values in a rank's share of a split, and its users with each.

    Args:
        schema: names the columns.
    """

    def __init__(self, schema: Schema) -> None:
        """Start without rows."""
        self.schema, self.label = schema, schema.of_kind("label")[0]
        self.rows = np.zeros(2, np.int64)  # with label 0 and 1
        self.users = [np.zeros(0, np.int64)] * 2  # with a row of label 0 and of 1

    def add(self, table: pa.Table) -> None:
        """Count the rows of a chunk; rows that do not count or have no label are left out."""
        known = rows_that_count(table, self.schema)
        labels = table[self.label].to_numpy()
        known &= ~np.isnan(labels)
        positive = labels[known] == 1
        group = RAW_GROUP if RAW_GROUP in table.column_names else self.schema.group
        users = table[group].to_numpy()[known]
        for value, rows in enumerate((~positive, positive)):
            self.rows[value] += rows.sum()
            if not self._has_user_with_both():
                self.users[value] = np.union1d(self.users[value], users[rows])

    def _has_user_with_both(self) -> bool:
        """Return whether a user has rows of both labels; then users need not be kept."""
        return bool(np.isin(self.users[0], self.users[1], assume_unique=True).any())

    def totals(self, ranks: Ranks) -> tuple[int, int, bool]:
        """Return the rows of all ranks with label 0 and 1, and if a user has both. A collective."""
        of_ranks = ranks.gather((*self.rows.tolist(), self._has_user_with_both()))
        negatives, positives = (sum(of[value] for of in of_ranks) for value in (0, 1))
        has_both = any(of[2] for of in of_ranks)
        if not has_both:  # no rank has one alone
            users = [torch.from_numpy(users) for users in self.users]
            self.users = [gather_rows(of, ranks.group).unique().numpy() for of in users]
            has_both = self._has_user_with_both()
        return negatives, positives, has_both


def check_validation(job: Job, labels: ValidationLabels) -> None:
    """Check that the validation split defines what chooses the best model. A collective.

    Raises:
        ValueError: on every rank, if it does not.
    """
    negatives, positives, has_both = labels.totals(job.ranks)
    by, label = job.config.best_model_by, f"column '{labels.label}'"
    cause = None
    if job.schema.label_losses[0] != "bce":
        cause = None if negatives + positives else f"{label} is known in no row"
    elif positives == 0:
        cause = f"{label} has no row with label 1"
    elif needs_search(by):
        with job.ranks.raise_on_all_ranks():
            items = len(catalogue_of(job))
        if items <= RETRIEVAL_DEPTH and by == "recall":
            cause = f"of a catalogue of {items} items every one is among the {RETRIEVAL_DEPTH} best"
    elif negatives == 0:
        cause = f"{label} has no row with label 0"
    elif "gauc" in METRICS[by] and not has_both:
        cause = f"no user has rows of both labels in {label}"
    if cause is not None:
        raise ValueError(undefined_selection(job, cause, positives, negatives))


def undefined_selection(job: Job, cause: str, positives: int = 1, negatives: int = 1) -> str:
    """Return the error message on a validation split that cannot choose the best model."""
    fix = "use another validation split"
    if positives and not negatives:
        fix += ", or set best_model_by: recall with ranking.name two_tower"
    elif positives and job.config.best_model_by != "auc":
        other = "ndcg" if needs_search(job.config.best_model_by) else "auc"
        fix += f", or set best_model_by: {other}"
    return (
        f"{job.root}/valid: best_model_by {job.config.best_model_by} cannot choose the best model: "
        f"{cause}; {fix}"
    )
