"""A dataset whose ids are raw: words and any integers, some of them only in one split."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.datasets import write_parquet

SCHEMA = """\
target_item: item
group: user
columns:
  user:    {{kind: id, num_embeddings: 6, vocabulary: {user}}}
  friends: {{kind: ids, shares: user}}
  item:    {{kind: id, num_embeddings: 8, vocabulary: {item}}}
  history: {{kind: sequence, shares: item, parallel: [history_liked]}}
  words:   {{kind: ids, num_embeddings: 9, vocabulary: {words}}}
  liked:   {{kind: label}}
items:
  id: item
  columns:
    text: {{kind: text}}
"""
EXACT = "{kind: exact}"

TRAIN: dict[str, list[Any]] = {
    "user": ["ann", "bob", "ann"],
    "friends": [["bob"], [], ["bob", "eve"]],
    "item": [-7, 2**62, -7],
    "history": [[], [-7], [2**62, 40]],
    "history_liked": [[], [1.0], [0.0, 1.0]],
    "words": [["x"], None, ["y", "x"]],
    "liked": [1, 0, 1],
}
TEST: dict[str, list[Any]] = {
    "user": ["zoe"],
    "friends": [["ann"]],
    "item": [0],
    "history": [[40, -7]],
    "history_liked": [[1.0, 1.0]],
    "words": [["z"]],
    "liked": [0],
}
ITEMS: dict[str, list[Any]] = {"item": [40, 0, -7, 2**62], "text": ["forty", "zero", None, "large"]}

# The rows of an exact map: train first, column by column, then test, then items.
USER_ROWS = {"ann": 0, "bob": 1, "eve": 2, "zoe": 3}
ITEM_ROWS = {-7: 0, 2**62: 1, 40: 2, 0: 3}
WORD_ROWS = {"x": 0, "y": 1, "z": 2}


def write_raw_dataset(
    folder: Path, user: str = EXACT, item: str = EXACT, words: str = EXACT
) -> Path:
    """Writes `folder` with these vocabularies; maps are not prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.yaml").write_text(SCHEMA.format(user=user, item=item, words=words))
    write_parquet(folder / "train" / "part-0.parquet", pa.table(TRAIN), row_group_size=2)
    write_parquet(folder / "test" / "part-0.parquet", pa.table(TEST))
    write_parquet(folder / "items" / "part-0.parquet", pa.table(ITEMS))
    return folder


def write_rows_dataset(folder: Path) -> Path:
    """The same dataset with each id written as its row."""
    write_raw_dataset(folder)
    text = (folder / "schema.yaml").read_text().replace(", vocabulary: {kind: exact}", "")
    (folder / "schema.yaml").write_text(text)
    rows: dict[str, dict[Any, int]] = {
        "user": USER_ROWS,
        "friends": USER_ROWS,
        "item": ITEM_ROWS,
        "history": ITEM_ROWS,
        "words": WORD_ROWS,
    }
    for split, columns in (("train", TRAIN), ("test", TEST), ("items", ITEMS)):
        row_columns = {
            name: [_row_in(rows[name], value) if name in rows else value for value in values]
            for name, values in columns.items()
        }
        write_parquet(folder / split / "part-0.parquet", pa.table(row_columns))
    return folder


def _row_in(rows: dict[Any, int], value: Any) -> Any:
    if isinstance(value, list):
        return [rows[one] for one in value]
    return None if value is None else rows[value]
