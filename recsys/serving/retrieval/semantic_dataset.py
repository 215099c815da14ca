"""A dataset with one more column: ids of each row's ranked item.

Files that do not change are hard links where the file system has them, else copies.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from recsys.build import SPLITS
from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.filesystem import Location, link_or_copy, whole_folder
from recsys.data.parquet.file import open_parquet
from recsys.data.schema import Schema


def write_dataset_with(
    root: Location, schema: Schema, ids: pa.Table, column: str, num_ids: int, out: Path
) -> None:
    """Write a dataset whose rows also have the ids of their item; it appears whole or not at all.

    Args:
        root: the dataset, on a local disk.
        schema: its columns.
        ids: raw ids of the items in the column of the target item, and lists of ids in `column`.
        column: name of the new column, of kind ids.
        num_ids: the ids lie in [0, num_ids).
        out: a folder that does not exist. Rows of other items have an empty list.

    Raises:
        ValueError: the dataset is not local, or has such a column.
    """
    content = schema_without(root, column)
    content["columns"][column] = {"kind": "ids", "num_embeddings": num_ids}
    with whole_folder(out) as partial:
        for entry in sorted(Path(root.path).iterdir()):
            if entry.is_dir() and entry.name not in SPLITS:
                shutil.copytree(entry, partial / entry.name, copy_function=link_or_copy)
            elif entry.is_file() and entry.name != "schema.yaml":
                link_or_copy(entry, partial / entry.name)
        (partial / "schema.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        for split in SPLITS:
            folder = root / split
            for file in folder.files(".parquet"):  # partitions have files of equal names
                written = partial / split / Path(file.path).relative_to(folder.path)
                written.parent.mkdir(parents=True, exist_ok=True)
                _write_file(file, written, schema, ids, column)


def schema_without(root: Location, column: str) -> dict[str, Any]:
    """Return the content of a dataset's `schema.yaml`, to which a column is to be added.

    Raises:
        ValueError: the dataset is not local, or has such a column.
    """
    if not root.is_local:
        raise ValueError(f"{root}: is not on a local disk; copy the dataset to one")
    content: dict[str, Any] = load_plain_yaml((root / "schema.yaml").read_bytes())
    if column in content["columns"]:
        raise ValueError(f"{root}/schema.yaml: has a column '{column}' already; remove it")
    return content


def _write_file(file: Location, out: Path, schema: Schema, ids: pa.Table, column: str) -> None:
    """Write a file of rows with the new column, a row group at a time."""
    items, lists = ids[schema.target_item].combine_chunks(), ids[column].combine_chunks()
    writer: pq.ParquetWriter | None = None
    with open_parquet(file) as parquet:
        for index in range(parquet.num_row_groups):
            rows = parquet.read_row_group(index)
            of_rows = rows[schema.target_item].cast(items.type)
            found = lists.take(pc.index_in(of_rows, items).combine_chunks())
            found = pc.if_else(found.is_valid(), found, pa.scalar([], lists.type))
            rows = rows.append_column(column, found)
            writer = writer or pq.ParquetWriter(out, rows.schema)
            writer.write_table(rows)
    if writer is not None:
        writer.close()
