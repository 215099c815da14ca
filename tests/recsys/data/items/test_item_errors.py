"""Items that cannot be used are named by file, column and row."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_values import feature_tokens, usable_features
from recsys.diagnostics.dataset.command import explain_data
from tests.datasets import write_dataset
from tests.recsys.data.items.item_content import (
    MODALITIES,
    rewrite,
    table_of,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {}, num_items=8)


def test_a_schema_without_items_is_told_how_to_go_without_content(dataset: Path) -> None:
    schema = dataset / "schema.yaml"
    schema.write_text(schema.read_text().split("items:")[0])
    with pytest.raises(ValueError, match=f"{schema}: .* needs `items`.*`content: none`"):
        table_of(dataset)


@pytest.mark.parametrize("content", [["posters/1.jpg"] * 8, [b"posters/1.jpg"] * 8])
def test_paths_in_place_of_images_are_refused_before_any_content_is_prepared(
    tmp_path: Path, content: list[Any]
) -> None:
    data = write_dataset(tmp_path / "data", num_items=8)
    rewrite(
        data,
        lambda table: table.set_column(
            table.column_names.index("poster"), "poster", pa.array(content)
        ),
    )
    with pytest.raises(ValueError, match=r"column 'poster'.*(string|posters/1\.jpg)"):
        ContentStore(table_of(data), MODALITIES, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"column 'poster'.*(string|posters/1\.jpg)"):
        explain_data(str(data))


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
