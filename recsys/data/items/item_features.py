"""Stored features of items (a number, a list or a list of lists) as tokens of one width.

Shapes: n rows of a chunk, T tokens of them, W values of a token.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from recsys.data.parquet.bad_rows import Report
from recsys.data.parquet.values import is_list, list_lengths


def feature_tokens(chunk: pa.Array, where: str) -> tuple[np.ndarray, pa.Array]:
    """Split a chunk of features into tokens.

    A number, such as a price, is one token of width 1, a list of floats is one token, a list of
    lists has one token per inner list; null and empty have none.

    Returns:
        number of tokens of each row [n], and all tokens [T] as lists of floats.

    Raises:
        ValueError: the column has another type; `where` names file and column.
    """
    kind = chunk.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = chunk.drop_null().cast(pa.float64(), safe=False)
        return np.asarray(chunk.is_valid(), np.int64), pa.FixedSizeListArray.from_arrays(values, 1)
    is_nested = is_list(kind) and is_list(kind.value_type)
    value = kind.value_type if is_list(kind) else kind
    value = value.value_type if is_nested else value
    if not is_list(kind) or not pa.types.is_floating(value):
        raise ValueError(
            f"{where} has type {kind}, expected a number, list<float> or list<list<float>>; "
            "write one of them"
        )
    lengths = list_lengths(chunk)
    if is_nested:
        return lengths, chunk.flatten()
    return (lengths > 0).astype(np.int64), chunk.filter(pa.array(lengths > 0))


def usable_features(
    lengths: np.ndarray, tokens: pa.Array, width: int, report: Report
) -> tuple[np.ndarray, np.ndarray]:  # lengths [n], tokens [T]
    """Check widths and values of tokens, lists of floats; report bad rows and drop their tokens.

    Returns:
        number of tokens of each row [n], and their values float32 [T, W].
    """
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    widths = list_lengths(tokens)
    bad = np.bincount(row_of[widths != width], minlength=len(lengths)) > 0
    wrong_width = widths[(widths != width).argmax()] if bad.any() else width
    report(
        bad,
        f"a feature of other than {width} values",
        lambda row: (
            f"a feature has {wrong_width} values, earlier ones have {width}; write all of "
            "one width, or null for an item without"
        ),
    )
    kept = ~bad[row_of]
    row_of, tokens = row_of[kept], tokens.filter(pa.array(kept))
    with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, and are refused
        flat = tokens.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = flat.reshape(len(tokens), width)
    wrong = ~np.isfinite(values).all(axis=1)
    not_finite = np.bincount(row_of[wrong], minlength=len(lengths)) > 0
    flaw = "a value that is null or not finite"
    report(
        not_finite,
        f"a feature with {flaw}",
        lambda row: f"a feature has {flaw}; write null for an item without",
    )
    kept = ~not_finite[row_of]
    return np.bincount(row_of[kept], minlength=len(lengths)), values[kept]
