"""Each step against values worked out by hand, and what no step takes."""

import re
from datetime import UTC, date, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from embeddings import HashVocabulary
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column
from recsys.data.transforms.chain import chains_of
from recsys.data.transforms.columns import read_columns
from recsys.data.transforms.steps import STEPS, Moments, Quantiles

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)  # a Sunday
EVENING = 1_798_758_000  # 2026-12-31 23:00 UTC, already 2027 in Berlin, a Friday


def schema_with(**columns: dict[str, Any]) -> Schema:
    """The checks of a whole schema.yaml would take a tenth of a second."""
    by_name = {name: Column(**column) for name, column in columns.items()}
    schema = Schema("item", "user", by_name | {"liked": Column("label")})
    schema.transforms = chains_of(schema.columns, "item", "data/schema.yaml")
    return schema


def result(values: pa.Array | dict[str, Any], *steps: Any, **column: Any) -> list[Any]:
    """What the steps make of the values of column `x`, or of several."""
    table = pa.table(values if isinstance(values, dict) else {"x": values})
    schema = schema_with(x={"kind": "ids", "num_embeddings": 10**6, "transform": [*steps]} | column)
    return read_columns(table, schema, ["x"], "part-0.parquet")["x"].to_pylist()


@pytest.mark.parametrize(
    ("values", "steps", "expected"),
    [
        ([None, None], [{"fill": "none"}], ["none", "none"]),
        ([3, None], [{"fill": {"value": 0}}], [3, 0]),
        ([-5, 2], [{"clip": {"high": 1}}], [-5.0, 1.0]),
        ([5, 6], [{"standardize": {"mean": 5, "std": 0}}], [0.0, 1.0]),
        ([3], [{"bucketize": []}], [0]),
        ([NOON, None], ["hour"], [12, None]),
        ([NOON.replace(tzinfo=None)], [{"hour": "Europe/Berlin"}], [13]),
        ([EVENING * 1000], [{"weekday": {"zone": "Europe/Berlin", "unit": "ms"}}], [4]),
        ([date(2026, 11, 1)], [{"weekday": "America/New_York"}], [6]),
        (["2026-11-01"], [{"weekday": "America/New_York"}], [6]),  # the same date in JSON
        (["2026-11-01", "2026-11-01T12:30:00", None], ["hour"], [0, 12, None]),
        (["2026-11-01 12:00:00+02:00", "2026-11-01T12:00:00Z"], ["hour"], [10, 12]),
    ],
)
def test_a_step_does_what_its_name_says(
    values: list[Any], steps: list[Any], expected: list[Any]
) -> None:
    assert result(pa.array(values), *steps) == expected


def test_strings_and_integers_are_hashed_as_the_vocabularies_hash_them() -> None:
    for ids in (pa.array(["a", "b"]), pa.array([7, 8]), pa.array(["a", "b"]).dictionary_encode()):
        rows = HashVocabulary(50, seed=3).rows_of(ids)[:, 0].tolist()
        assert result(ids, {"hash": {"buckets": 50, "seed": 3}}) == rows
    assert result(pa.array([None, "a"]), {"hash": 1}) == [None, 0]


def test_numbers_are_read_as_float32_so_that_every_width_gives_the_same() -> None:
    for kind, number in product((pa.float32(), pa.float64()), (0.1, 0.7)):
        assert result(pa.array([number], kind), {"bucketize": [number]}) == [1]
    assert result(pa.array([2**24, 0]), {"bucketize": [1e-50, 2**24 + 1]}) == [1, 0]


def test_a_column_reads_the_result_of_another_but_itself_from_the_file() -> None:
    schema = schema_with(
        price={"kind": "dense", "transform": [{"fill": 3}]},
        bucket={
            "kind": "id",
            "num_embeddings": 2,
            "column": "price",
            "transform": [{"bucketize": [3]}],
        },
        both={
            "kind": "id",
            "num_embeddings": 9,
            "column": ["bucket", "city"],
            "transform": ["cross"],
            "vocabulary": {"kind": "hash"},
        },
        renamed={"kind": "dense", "column": "cost"},
    )
    table = pa.table({"price": [None, 1.0], "city": ["A", "B"], "cost": [1, 2]})
    assert schema.file_columns(["both", "renamed", "user"]) == ["city", "price", "cost", "user"]
    read = read_columns(table, schema, ["both", "price", "renamed"], "")
    assert read.to_pydict() == {
        "both": ["1\x1fA", "0\x1fB"],
        "price": [3.0, 1.0],
        "renamed": [1, 2],
    }


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        (["a"], ["log1p"], "x'.*log1p.*string"),
        (["tea"], ["hour"], "x'.*hour.*tea"),
        ([None, EVENING * 1000], ["weekday"], "x'.*weekday.*9999 where unit is s"),
        ([1], [{"fill": "a"}], "x'.*fill.*'a'.*int64"),
        ([True], [{"fill": 0.5}], "x'.*fill.*0.5.*bool"),
        (["a"], [{"fill": 1}], "x'.*fill.*1.*string"),
        ([1], ["standardize"], "x'.*standardize.*recsys prepare transforms"),
    ],
)
def test_a_step_on_a_wrong_type_is_named(values: list[Any], steps: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"part-0.parquet: column '{message}"):
        result(pa.array(values), *steps)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"transform": ["logp"]}, "'logp'.*log1p"),
        ({"transform": [{"clip": {"lov": 1}}]}, "clip.lov.*low"),
        ({"transform": [{"clip": {"low": 2, "high": 1}}]}, "step 1: .*low is 2"),
        ({"transform": ["fill"]}, "fill needs value"),
        ({"transform": [{"fill": 1, "clip": 2}]}, "fill.*clip"),
        ({"transform": [{"bucketize": [2, 1]}]}, "boundaries are .2.*, 1"),
        ({"transform": [{"hash": 0}]}, "0"),
        ({"transform": [{"hour": "Europe/Berlim"}]}, "Europe/Berlim"),
        ({"transform": [{"hour": {"unit": "h"}}]}, "hour.unit is h"),
        ({"transform": [{"bucketize": {"quantiles": 20}}], "num_embeddings": 19}, "19.*20"),
        ({"column": ["a", "b"]}, "2 columns"),
        ({"column": ["a", "b"], "transform": ["standardize", "cross"]}, "before cross"),
        ({"column": "liked"}, "'liked', .* kind label"),
        ({"column": "y"}, "x -> y -> x|y -> x -> y"),
    ],
)
def test_what_a_schema_cannot_mean_is_named_before_any_row_is_read(
    column: dict[str, Any], message: str
) -> None:
    y = {"kind": "id", "num_embeddings": 30, "column": "x"}
    with pytest.raises(ValueError, match=rf"^data/schema.yaml: (?s:.)*{message}"):
        schema_with(x={"kind": "id", "num_embeddings": 30} | column, y=y)


@pytest.mark.parametrize("name", ["item", "history"])
def test_the_target_item_and_histories_are_not_transformed(name: str) -> None:
    columns = {
        "item": {"kind": "id", "num_embeddings": 3},
        "history": {"kind": "sequence", "shares": "item"},
    }
    columns[name]["transform"] = [{"hash": 3}]
    with pytest.raises(ValueError, match=f"column '{name}'"):
        schema_with(**columns)


def test_the_page_has_every_step_and_its_example_is_a_schema() -> None:
    page = (Path(__file__).parents[4] / "recsys/data/transforms/README.md").read_text()
    example = yaml.safe_load(page.partition("```yaml")[2].partition("```")[0])["columns"]
    for column in example.values():
        column.pop("vocabulary", None)
    assert list(schema_with(**example).transforms) == list(example)
    assert [name for name in STEPS if not re.search(rf"`{{?{name}\b", page)] == []


def test_a_truth_value_is_filled_by_the_number_that_the_column_names() -> None:
    values = pa.array([True, False, None])
    assert result(values, column="x", kind="dense", fill=-1) == [1.0, 0.0, -1.0]
    assert result(values, column="x", kind="dense", fill=1) == [True, False, True]


def test_equal_numbers_have_no_deviation_though_their_mean_is_rounded() -> None:
    fit = Moments()
    fit.add(np.full(7, np.log1p(0.5)))
    assert result(pa.array([1.5]), {"standardize": fit.result()})[0] == pytest.approx(
        1.5 - np.log1p(0.5)
    )


def test_quantiles_of_many_values_are_those_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.transforms.steps.SAMPLED", 20_000)
    values, fit = np.random.default_rng(0).permutation(100_000) / 1e5, Quantiles(quantiles=4)
    for chunk in np.array_split(values, 7):
        fit.add(chunk)
    assert len(fit.values) == 20_000
    np.testing.assert_allclose(fit.result()["boundaries"], [0.25, 0.5, 0.75], atol=0.01)
