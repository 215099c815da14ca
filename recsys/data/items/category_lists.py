"""The categories of items in a column of their files: one of each item, or a list.

Shapes: n rows of a chunk.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.parquet.values import is_list, list_lengths


def category_lists(values: pa.Array, where: str) -> tuple[np.ndarray, pa.Array]:
    """Return the number of categories of each row, int64 [n], and those of all rows.

    A row without a list has one category, which may be null.

    Raises:
        ValueError: they are neither texts nor integers; `where` names file and column.
    """
    several = is_list(values.type)
    kind = values.type.value_type if several else values.type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_null(kind) or is_id_type(kind)):
        raise ValueError(
            f"{where} of kind category has type {values.type}, expected integer or string, or a "
            "list of them; write it so"
        )
    if not several:
        return np.ones(len(values), np.int64), values
    return list_lengths(values).astype(np.int64), values.flatten()
