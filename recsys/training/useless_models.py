"""Ends a job whose model is of no use, and names the columns that are the usual cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from recsys.config import Config, softmax_settings
from recsys.data.number_ranges import NumberRanges
from recsys.data.row_source import RowSource
from recsys.evaluation.model_selection import check_log_loss, check_rmse

MOST_NAMED = 5


def require_useful(
    report: Mapping[str, Any],
    config: Config,
    where: str,
    rows: Callable[[], RowSource],
    kept: str,
    slack: float = 1.0,
) -> None:
    """Check the metrics of a model's predictions; a softmax loss gives no probabilities.

    Args:
        report: the metrics.
        config: settings of the model.
        where: what was predicted, for the message.
        rows: opens rows with the numbers that the model reads; called for a useless model alone.
        kept: what is kept all the same, for the message.
        slack: factor of the limits, above 1 for few rows.

    Raises:
        ValueError: the predictions are useless; names the columns of wide range.
    """
    if softmax_settings(config.ranking) is not None:
        return
    try:
        for check in (check_log_loss, check_rmse):
            check(report, where, "", slack)
    except ValueError as error:
        raise ValueError(f"{error}{_advice(rows())}. {kept}") from error


def slack_for(num_rows: int) -> float:
    """Return the `slack` of a split that no model was chosen by: the loss of few rows varies."""
    return 1 + 10 / math.sqrt(max(num_rows, 1))


def _advice(rows: RowSource) -> str:
    """Return what to look at: the columns of wide range, if there are any."""
    ranges = NumberRanges(rows.schema)
    for table in rows.read(*rows.share(0, 1)):
        ranges.add(table)
    wide = {name: column for name, column in ranges.by_column.items() if column.is_wide}
    widest = sorted(wide, key=lambda name: -max(-wide[name].least, wide[name].greatest))
    if not widest:
        return "look at columns and modalities (`recsys explain-data`), or lower the learning rates"
    named = ", ".join(f"'{name}' ({wide[name]})" for name in widest[:MOST_NAMED])
    return (
        f"its columns of wide range are {named}: take their logarithm or scale them to about 1 "
        "(ranking.scale_inputs does so by the training rows), or lower the learning rates"
    )
