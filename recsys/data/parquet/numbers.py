"""Detect unusable numbers: labels other than 0 and 1, weights below 0, values not finite.

Shapes: N values of a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from recsys.data.schema import Schema
from recsys.data.schema_columns import Column

# Mask of bad values [N], their common reason, and a function from one to its message.
BadNumbers = tuple[np.ndarray, str, Callable[[float], str]]


def bad_numbers(
    numbers: np.ndarray, column: Column | None
) -> Iterator[BadNumbers]:  # numbers float32 [N]
    """Yield the unusable values of a column, by reason; None: of a list of floats."""
    finite = np.isfinite(numbers)
    yield (
        ~finite,
        "not finite",
        lambda value: f"value {value}; write a finite number that fits float32",
    )
    if column is None:
        return
    negative = finite & (numbers < 0)
    if column.kind == "weight":
        yield negative, "weight below 0", lambda value: f"value {value}; a weight is 0 or more"
    if column.kind == "sampled":
        yield (
            finite & (numbers != 0) & (numbers != 1),
            "sampled other than 0 and 1",
            lambda value: f"value {value}; write 1 in rows whose item was drawn, else 0",
        )
    if column.kind == "label" and column.loss == "poisson":
        yield negative, "label below 0", lambda value: f"value {value}; a count is 0 or more"
    if column.kind == "label" and column.loss in (None, "bce"):
        yield (
            finite & (numbers != 0) & (numbers != 1),
            "label other than 0 and 1",
            lambda value: (
                f"value {value}; a label is 0 or 1, or give it a loss (mse, huber, poisson)"
            ),
        )


def note_rows_without_label(
    table: pa.Table,
    schema: Schema,
    note: Callable[[str, np.ndarray, str, Callable[[int], str]], None],
) -> None:
    """Note the rows in which all labels are null."""
    labels = [name for name in schema.of_kind("label") if name in table.column_names]
    if labels and all(schema.columns[name].nullable for name in labels):
        unknown = np.logical_and.reduce([table[name].is_null().to_numpy() for name in labels])
        note(
            labels[0],
            unknown,
            "no label",
            lambda row: f"null, as all of {labels}; drop rows without any label",
        )
