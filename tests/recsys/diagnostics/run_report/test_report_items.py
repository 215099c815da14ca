"""Which items the report shows, what they are called, and which lie near to which."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from recsys.data.filesystem import Location
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.item_table import ItemTable
from recsys.data.schema import load_schema
from recsys.diagnostics.run_report.embedding_maps import embedding_maps
from recsys.diagnostics.run_report.item_columns import column_values
from recsys.diagnostics.run_report.item_descriptions import (
    categories,
    category_column,
    category_text,
    item_names,
    item_pictures,
    small_picture,
)
from recsys.diagnostics.run_report.item_vectors import ItemVectors
from recsys.diagnostics.run_report.map_colours import PALETTE, Categories
from recsys.diagnostics.run_report.nearest_items import example_items
from recsys.diagnostics.run_report.neighbours import (
    chance_of_same_category,
    nearest,
    same_category_share,
)
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

    found = column_values(table, "brand", np.array([40, 2, 9, 7, 99, 2]))

    assert found == ["x", "b", None, "g", None, "b"]


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


def test_texts_that_are_no_utf_8_are_shown_with_a_mark(tmp_path: Path) -> None:
    text = pa.array([b"caf\xe9", b"tea"], pa.binary()).view(pa.string())
    table = items_of(tmp_path, {"item": pa.array([0, 1]), "text": text})

    assert item_names(table, np.arange(2)) == ["caf\ufffd", "tea"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["Comedy|Drama", " War ", "", None]),
        pa.array(["Comedy|Drama", "War", "", None]).dictionary_encode(),
        pa.array([["Comedy", "Drama"], ["War"], [], None]),
    ],
)
def test_the_first_of_several_categories_counts(tmp_path: Path, values: pa.Array) -> None:
    table = items_of(tmp_path, {"item": pa.arange(0, 4), "genre": values})

    assert category_column(table.files, None) == "genre"
    assert categories(table, "genre", np.arange(4)) == ["Comedy", "War", None, None]
    read = [category_text(value) for value in column_values(table, "genre", np.arange(4))]
    assert read == ["Comedy, Drama", "War", "", ""]


def test_integers_are_categories_and_zero_is_one(tmp_path: Path) -> None:
    table = items_of(tmp_path, {"item": pa.array([0, 1]), "shelf": pa.array([0, 5])})

    assert category_column(table.files, None) is None
    assert category_column(table.files, "shelf") == "shelf"
    assert categories(table, "shelf", np.arange(2)) == ["0", "5"]
    assert category_text(0) == "0"


def test_a_column_chosen_without_items_is_refused() -> None:
    with pytest.raises(ValueError, match="--colour_by brand: "):
        category_column([], "brand")


def test_pictures_are_jpegs_of_at_most_96_pixels_in_height(tmp_path: Path) -> None:
    tall = png(np.random.default_rng(0), width=100, height=400)
    posters = pa.array([[None, tall], [b"damaged"], [], None], pa.list_(pa.binary()))
    table = items_of(tmp_path, {"item": pa.arange(0, 4), "poster": posters})

    first, *others = item_pictures(table, np.arange(4))

    assert first is not None
    shown = Image.open(BytesIO(first))
    assert (shown.format, shown.size) == ("JPEG", (24, 96))
    assert others == [b"", b"", b""]
    assert item_pictures(None, np.arange(2)) == [None, None]
    small = small_picture(png(np.random.default_rng(0), width=12, height=10))
    assert Image.open(BytesIO(small)).size == (12, 10)


def test_examples_are_frequent_middling_and_unseen_items_chosen_without_chance() -> None:
    # Frequent first these are items 2, 6, 1, 5, 7, 3, 8 and 9. The first three have 14 of all 30
    # impressions, and the fourth, item 5, makes it half.
    counts = ItemCounts(np.array([1, 2, 3, 5, 6, 7, 8, 9]), np.array([4, 5, 3, 4, 5, 4, 3, 2]))
    test_items = np.array([10, 4, 10, 2, 2, 2])
    candidates = np.random.default_rng(0).permutation(11)

    chosen = example_items(counts, test_items, candidates)

    assert chosen.frequent.tolist() == [2, 6]
    assert chosen.middling.tolist() == [5, 7]
    assert chosen.unseen.tolist() == [10, 4]


def test_of_few_items_none_is_an_example_twice() -> None:
    chosen = example_items(
        ItemCounts(np.arange(3), np.array([4, 1, 2])), np.array([0]), np.arange(3)
    )

    assert (chosen.frequent.tolist(), chosen.middling.tolist()) == ([0, 2], [1])
    assert chosen.unseen.tolist() == []


def test_the_nearest_leave_out_the_item_itself_wherever_it_lies() -> None:
    vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])

    cosines, places = nearest(vectors[[1, 2]], vectors, np.array([1, -1]), 2)

    assert places.tolist() == [[0, 3], [2, 3]]
    torch.testing.assert_close(cosines, torch.tensor([[1.0, 0.5**0.5], [1.0, 0.5**0.5]]))


def test_the_share_of_neighbours_of_one_category_is_1_for_tight_groups() -> None:
    torch.manual_seed(0)
    groups = ["a"] * 12 + ["b"] * 12
    tight = torch.tensor([[1.0, 0.0]] * 12 + [[0.0, 1.0]] * 12) + 0.01 * torch.randn(24, 2)
    near_to_all = torch.tensor([[1.0, 0.0]])

    assert same_category_share(tight, groups) == 1
    assert same_category_share(torch.cat([tight, near_to_all]), [*groups, None]) == 1
    assert chance_of_same_category(groups) == pytest.approx(11 / 23)


def test_random_vectors_have_neighbours_of_one_category_by_chance() -> None:
    torch.manual_seed(0)
    values = [("a", "a", "a", "b")[item % 4] for item in range(400)]

    share = same_category_share(torch.randn(400, 8), values)

    assert share == pytest.approx(chance_of_same_category(values), abs=0.03)


def test_a_map_names_the_eight_most_frequent_categories_and_greys_the_rest() -> None:
    torch.manual_seed(0)
    values = [f"kind {number}" for number in range(10) for _ in range(20 - number)]
    vectors = ItemVectors(np.arange(len(values)), torch.randn(len(values), 4))

    section = embedding_maps(vectors, np.ones(len(values), int), Categories("kind", values))
    drawing = section.drawings[0].svg.decode()

    assert all(colour in drawing for colour in PALETTE)
    assert ">kind 7<" in drawing and ">kind 8<" not in drawing and ">other<" in drawing
    assert [row[0] for row in section.tables[-1].rows] == ["ID vectors", "chance"]
    assert section.tables[-1].rows[-1][1] == f"{100 * chance_of_same_category(values):.1f} %"
