"""Forms in which items have stored features."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.items.item_features import feature_tokens, usable_features


def ignore(*arguments: object) -> None:
    """Report no row."""


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.int64(), pa.uint8()])
def test_a_number_is_a_token_of_width_one_and_null_has_none(kind: pa.DataType) -> None:
    column = pa.array([3, None, 7], kind)
    assert feature_tokens(column.slice(1), "items")[0].tolist() == [0, 1]
    lengths, values = usable_features(*feature_tokens(column, "items"), 1, ignore)
    assert lengths.tolist() == [1, 0, 1]
    assert values.tolist() == [[3], [7]]
    assert values.dtype == np.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_number_that_is_not_finite_is_reported(value: float) -> None:
    reported: list[list[bool]] = []
    column = pa.array([1.0, value])
    usable_features(
        *feature_tokens(column, "items"), 1, lambda bad, *words: reported.append(bad.tolist())
    )
    assert [False, True] in reported


@pytest.mark.parametrize("column", [pa.array(["9.5"]), pa.array([True]), pa.array([[1, 2]])])
def test_other_types_are_refused_by_name(column: pa.Array) -> None:
    with pytest.raises(ValueError, match="'price'"):
        feature_tokens(column, "items, column 'price'")
