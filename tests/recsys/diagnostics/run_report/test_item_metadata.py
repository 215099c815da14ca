"""What items are called, their categories and pictures, from the items' files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.items.item_table import ItemTable
from recsys.data.schema import load_schema
from recsys.diagnostics.run_report.projector import (
    categories,
    category_column,
    column_values,
    item_names,
    item_pictures,
)
from recsys.storage.location import Location
from tests.datasets import png, write_parquet

SCHEMA = """
target_item: item
group: user
columns:
  user: {kind: id, num_embeddings: 2}
  item: {kind: id, num_embeddings: 100}
  liked: {kind: label}
items:
  id: item
  columns:
    text: {kind: text}
    poster: {kind: image}
"""


def items_of(folder: Path, *files: dict[str, pa.Array], row_group_size: int = 2) -> ItemTable:
    """Items in as many files."""
    (folder / "schema.yaml").write_text(SCHEMA)
    for part, columns in enumerate(files):
        write_parquet(folder / f"items/part-{part}.parquet", pa.table(columns), row_group_size)
    root = Location.of(folder)
    return ItemTable(root, load_schema(root))


def test_values_are_those_of_the_items_whatever_file_and_row_group_they_lie_in(
    tmp_path: Path,
) -> None:
    first = {"item": pa.array([7, 3, 9, 1, 2]), "brand": pa.array(["g", "c", None, "a", "b"])}
    second = {"item": pa.array([50, 40]), "brand": pa.array(["y", "x"])}
    table = items_of(tmp_path, first, second)

    values = column_values(table, "brand", np.array([40, 2, 9, 7, 99, 2]))

    assert values == ["x", "b", None, "g", None, "b"]


def test_an_item_is_called_by_title_then_by_the_beginning_of_its_text_then_by_id(
    tmp_path: Path,
) -> None:
    table = items_of(
        tmp_path,
        {
            "item": pa.array([0, 1, 2, 3]),
            "title": pa.array(["Alien", None, " ", None]),
            "text": pa.array(["unused", "a  b\n" + 60 * "c", "short", None]),
        },
    )

    called = item_names(table, np.arange(5))

    assert called == ["Alien", "a b " + 55 * "c" + "…", "short", "item 3", "item 4"]
    assert item_names(None, np.array([3])) == ["item 3"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["Comedy|Drama", " War ", "", None]),
        pa.array([["Comedy", "Drama"], ["War"], [], None]),
    ],
)
def test_the_first_of_several_categories_counts(tmp_path: Path, values: pa.Array) -> None:
    table = items_of(tmp_path, {"item": pa.arange(0, 4), "genre": values})

    assert category_column(table.files, None) == "genre"
    assert categories(table, "genre", np.arange(4)) == ["Comedy", "War", None, None]


def test_pictures_lie_on_white_squares(tmp_path: Path) -> None:
    tall = png(np.random.default_rng(0), width=100, height=400)
    posters = pa.array([[None, tall], [b"damaged"], [], None], pa.list_(pa.binary()))
    table = items_of(tmp_path, {"item": pa.arange(0, 4), "poster": posters})

    pictures = item_pictures(table, np.arange(4))

    assert pictures is not None and pictures.shape == (4, 3, 48, 48)
    assert (pictures[0] < 1).any(dim=0).nonzero()[:, 1].unique().tolist() == [*range(18, 30)]
    assert (pictures[1:] == 1).all()
    assert item_pictures(None, np.arange(2)) is None
