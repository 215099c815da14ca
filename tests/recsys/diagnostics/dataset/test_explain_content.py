"""Content of items that training would refuse ends `explain-data` with the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.diagnostics.dataset.command import explain_data
from tests.datasets import png, write_dataset, write_parquet

INF = float("inf")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("poster", png(np.random.default_rng(0))[:80], "truncated"),
        ("poster", b"<svg/>", "<svg/>"),
        ("clip", [INF] * 6, "not finite"),
        ("clip", [0.5] * 7, "7 values"),
    ],
)
def test_content_that_ends_training_ends_it_with_the_same_words(
    name: str, content: Any, word: str, tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "data")
    file = data / "items" / "part-0.parquet"
    table = pq.read_table(file)
    values = table[name].to_pylist()
    values[20] = content
    place = table.schema.get_field_index(name)
    write_parquet(file, table.set_column(place, name, pa.array(values, table[name].type)))
    with pytest.raises(ValueError, match=f"column '{name}', row 20: .*{word}"):
        explain_data(str(data))
    explain_data(str(data), "skip")


def test_images_of_any_binary_type_are_opened(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    file = data / "items" / "part-0.parquet"
    table = pq.read_table(file)
    place, posters = table.schema.get_field_index("poster"), table["poster"].combine_chunks()
    for array in (posters.cast(pa.binary_view()), posters.dictionary_encode()):
        write_parquet(file, table.set_column(place, "poster", array))
        assert explain_data(str(data)).items.columns["poster"].formats["PNG"] == 29


@pytest.mark.parametrize(
    ("categories", "values", "missing"),
    [
        (pa.array([["a", "b"], [], None, ["b", None]] + [["a"]] * 26), 2, 2),
        (pa.array([["a"], ["b"]] * 15).cast(pa.list_(pa.dictionary(pa.int8(), pa.string()))), 2, 0),
        (pa.array([[1, 2], [3]] * 15), 3, 0),
        (pa.array([[]] * 30), 0, 30),
        (pa.nulls(30), 0, 30),
        (pa.array(["a", None, "c"] * 10), 2, 10),
    ],
)
def test_categories_are_counted_one_by_one_in_lists_and_alone(
    categories: pa.Array, values: int, missing: int, tmp_path: Path
) -> None:
    data = with_categories(tmp_path, categories)
    items = explain_data(str(data)).items
    assert items is not None
    column = items.columns["genre"]
    assert (column.values, column.missing) == (values, missing)


def test_categories_of_another_type_are_named(tmp_path: Path) -> None:
    data = with_categories(tmp_path, pa.array([{"a": 1}] * 30))
    with pytest.raises(ValueError, match=r"items/part-0\.parquet: column 'genre' .*struct"):
        explain_data(str(data))


def with_categories(folder: Path, categories: pa.Array) -> Path:
    """The small dataset with a category of each item."""
    data = write_dataset(folder / "data")
    file = data / "items" / "part-0.parquet"
    write_parquet(file, pq.read_table(file).append_column("genre", categories))
    schema = (data / "schema.yaml").read_text()
    (data / "schema.yaml").write_text(schema + "    genre: {kind: category}\n")
    return data
