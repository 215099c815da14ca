"""Metrics of the setting `metrics`, built in or user-defined. Shapes: N rows of a split."""

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from recsys.config import MetricSettings
from recsys.config.named_parts import make_part
from recsys.data.item_frequency import SUBSETS

METRICS = {"precision_at_k": "recsys.evaluation.further_metrics:PrecisionAtK"}
# Keys of reports, which metrics must not use as names.
RESERVED = {"auc", "gauc", "logloss", "ne", "calibration", "num_samples", *SUBSETS}
RESERVED |= {"rmse", "mae", "nrmse", "deviance", "num_users", "gauc_users", "sum_of_weights"}
RESERVED |= {"labels", "retrieval", "ids", "auc_unseen", "gauc_unseen"}
RESERVED |= {"partition", "model_of", "rows"}  # keys of a continual run's results


@runtime_checkable
class Metric(Protocol):
    """Computes one number from scored rows; constructed with the `options` of its settings.

    Only rank 0 calls it, so it must not use collectives. Labels are 0 and 1; a class with
    `regression = True` gets numeric labels.
    """

    def __call__(
        self,
        labels: np.ndarray,  # float [N], 0 or 1
        scores: np.ndarray,  # float [N], logits, or predictions of a numeric label
        groups: np.ndarray,  # int64 [N], the user of each row
        counts: np.ndarray,  # int64 [N], number of training rows of each row's item
    ) -> float | None:
        """Return the metric; None if it is undefined for these rows."""


def make_metrics(settings: Mapping[str, MetricSettings]) -> dict[str, Metric]:
    """Return the configured metrics by name; an unusable name or a bad option is a ValueError."""
    for name in settings:
        if not re.fullmatch(r"[\w.@ -]+", name):
            raise ValueError(
                f"metrics.{name}: trackers take names of letters, digits, spaces and . _ - @ alone"
            )
        if name in RESERVED:
            raise ValueError(
                f"metrics.{name}: every report has '{name}' already; choose another name than "
                f"{', '.join(sorted(RESERVED))}"
            )
    kind: Any = Metric
    return {
        name: make_part(f"metrics.{name}.metric", entry.metric, METRICS, kind, **entry.options)
        for name, entry in settings.items()
    }


def fits_loss(metric: Metric, loss: str) -> bool:
    """Return whether a metric applies to labels with this loss."""
    return bool(getattr(metric, "regression", False)) == (loss != "bce")


def call_metric(name: str, metric: Metric, *columns: np.ndarray) -> float | None:
    """Return a metric's value on columns [N]; a ValueError if it fails or is not finite."""
    try:
        value = metric(*columns)
        number = None if value is None else float(value)
    except Exception as error:  # user code may raise anything
        raise ValueError(
            f"metrics.{name}: failed on {len(columns[0]):,} rows ({type(error).__name__}: {error})"
        ) from error
    if number is not None and not np.isfinite(number):
        raise ValueError(
            f"metrics.{name}: is {number} on {len(columns[0]):,} rows; return None where rows "
            "do not define it"
        )
    return number


class PrecisionAtK:
    """Mean over users of the share of positives among the K rows with the highest scores.

    Tied rows count their expected value. Users without a positive are left out.
    """

    def __init__(self, k: int = 10) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        self.k = k

    def __call__(
        self, labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, counts: np.ndarray
    ) -> float | None:
        if len(labels) == 0:
            return None
        order = np.lexsort((-scores, groups))  # users one after the other, best rows first
        label, score, group = labels[order], scores[order], groups[order]
        new_user = np.append(True, group[1:] != group[:-1])
        new_tie = np.append(True, score[1:] != score[:-1]) | new_user
        user_begin, tie_begin = np.flatnonzero(new_user), np.flatnonzero(new_tie)
        user_of_tie = np.cumsum(new_user)[tie_begin] - 1

        rows = np.diff(np.append(tie_begin, len(label)))
        rows_above = tie_begin - user_begin[user_of_tie]
        expected_share = np.clip(self.k - rows_above, 0, rows) / rows  # of a tie's rows
        hits = np.add.reduceat(label, tie_begin) * expected_share
        user_rows = np.diff(np.append(user_begin, len(label)))
        precision = np.bincount(user_of_tie, hits) / np.minimum(user_rows, self.k)
        has_positive = np.add.reduceat(label, user_begin) > 0
        return float(precision[has_positive].mean()) if has_positive.any() else None
