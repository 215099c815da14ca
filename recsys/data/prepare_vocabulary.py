"""Build the maps of raw ids to rows, once, from a whole dataset before any training.

A map that is built again keeps its rows and appends new ids, so that earlier models stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary, is_id_type
from recsys.data.parquet.file import column_type, open_parquet, read_row_group
from recsys.data.parquet.values import is_list
from recsys.data.schema import Schema, load_schema, vocabulary_file
from recsys.data.schema_columns import MOST_ROWS
from recsys.data.transforms.columns import read_columns
from recsys.storage.location import Location

SPLITS = ("train", "valid", "test")
ITEMS = "items"


@dataclass(frozen=True)
class PreparedVocabulary:
    """Result of building or extending the map of one column."""

    file: Location
    num_ids: int
    num_new: int
    num_rows: int  # of the table, as training makes it
    num_embeddings: int | None  # of schema.yaml, if these are too few


def prepare_vocabularies(data: str) -> list[PreparedVocabulary]:
    """Build or extend the maps of the dataset at `data`; on an error, none of them changes."""
    root = Location.of(data)
    schema = load_schema(root, with_vocabularies=False)
    tables = schema.tables_with("exact")
    if not tables:
        raise ValueError(
            f"{root}/schema.yaml: no column has a vocabulary of kind exact; set it for a column of "
            "raw ids"
        )
    extended = [_extended(root, schema, table) for table in tables]
    for prepared, vocabulary in extended:
        _write(vocabulary, prepared.file)
    return [prepared for prepared, _ in extended]


def new_ids(
    root: Location, schema: Schema, split: str | None, maps: Mapping[str, ExactVocabulary]
) -> dict[str, pa.Array]:
    """Return, by table, the ids of a split (None: of the items) that its map does not have yet."""
    folders, ids = [ITEMS if split is None else split], {}
    for table in schema.tables_with("exact"):
        vocabulary = ExactVocabulary(MOST_ROWS)
        if table in maps:
            vocabulary.extend([maps[table].ids])
        num_before = len(vocabulary)
        _extend(root, schema, table, vocabulary, folders)
        ids[table] = vocabulary.ids.slice(num_before)
    return ids


def _extended(
    root: Location, schema: Schema, table: str
) -> tuple[PreparedVocabulary, ExactVocabulary]:
    file, vocabulary = vocabulary_file(root, table), ExactVocabulary(MOST_ROWS)
    if file.exists():
        vocabulary = ExactVocabulary.load(file.path, MOST_ROWS, file.arrow)
    num_new = _extend(root, schema, table, vocabulary, (*SPLITS, ITEMS))
    schema.make_room(table, len(vocabulary))
    rows = schema.limit(table), schema.grown.get(table)
    return PreparedVocabulary(file, len(vocabulary), num_new, *rows), vocabulary


def _extend(
    root: Location,
    schema: Schema,
    table: str,
    vocabulary: ExactVocabulary,
    folders: Sequence[str],
) -> int:
    """Add the ids in some folders to the vocabulary of a table; return the number of new ones."""
    try:
        return vocabulary.extend(_raw_ids(root, schema, table, vocabulary, folders))
    except ValueError as error:
        raise ValueError(
            f"vocabulary of column '{table}' in {root}/schema.yaml: {error}"
        ) from error


def _raw_ids(
    root: Location,
    schema: Schema,
    table: str,
    vocabulary: ExactVocabulary,
    folders: Sequence[str],
) -> Iterator[pa.Array]:
    """Yield ids of a table without nulls, one row group of one column at a time."""
    columns = [name for name in schema.columns if schema.vocabulary_of(name) is not None]
    columns = [name for name in columns if schema.table_of(name) == table]
    splits = [folder for folder in folders if folder != ITEMS]
    places = [(split, name) for split in splits for name in columns]
    if ITEMS in folders and schema.items is not None and table == schema.target_item:
        places.append((ITEMS, schema.items.id))
    if splits and not any((root / split).files(".parquet") for split in splits):
        raise ValueError(f"{root}: no *.parquet files in {', '.join(splits)}; write the rows first")
    for folder, name in places:
        is_of_rows = folder != ITEMS
        takes_lists = is_of_rows and schema.columns[name].kind in ("ids", "sequence")
        for file in (root / folder).files(".parquet"):
            for chunk in _chunks(file, name, schema if is_of_rows else None):
                if pa.types.is_null(chunk.type.value_type if is_list(chunk.type) else chunk.type):
                    continue  # nulls and empty lists alone
                if is_list(chunk.type) != takes_lists:
                    expected = "a list of ids" if takes_lists else "one id per row"
                    raise ValueError(
                        f"{file}: column '{name}' has type {chunk.type}, expected {expected}; "
                        "write it so, or change its kind in schema.yaml"
                    )
                ids = chunk.flatten() if takes_lists else chunk
                _check_type(file, name, ids.type, vocabulary)
                yield ids.drop_null()


def _chunks(file: Location, name: str, schema: Schema | None) -> Iterator[pa.Array]:
    columns = [name] if schema is None else schema.file_columns([name])
    with open_parquet(file) as parquet:
        for column in columns:
            column_type(parquet, file, column)
        for index in range(parquet.num_row_groups):
            table = read_row_group(parquet, file, index, columns)
            if schema is not None:
                table = read_columns(table, schema, [name], str(file))
            yield from table[name].chunks


def _check_type(file: Location, name: str, kind: pa.DataType, vocabulary: ExactVocabulary) -> None:
    """Check that ids have a type that a vocabulary accepts, the same in all files."""
    try:
        if not is_id_type(kind):
            raise ValueError(f"type {kind}, expected integer or string; write it so")
        vocabulary.check_type(kind)
    except ValueError as error:
        raise ValueError(f"{file}: column '{name}': {error}") from error


def _write(vocabulary: ExactVocabulary, file: Location) -> None:
    folder, name = file.path.rsplit("/", 1)
    partial = Location(file.filesystem, f"{folder}/.{name}.partial")
    file.filesystem.makedirs(folder, exist_ok=True)
    vocabulary.save(partial.path, file.arrow)
    file.filesystem.mv(partial.path, file.path)


def format_prepared(prepared: list[PreparedVocabulary]) -> str:
    """Return one line per map."""
    lines = []
    for one in prepared:
        line = f"{one.file}: {one.num_ids:,} ids, {one.num_new:,} of them new; "
        if one.num_embeddings is not None:
            line += f"its table grows from {one.num_embeddings:,} to {one.num_rows:,} rows; "
        lines.append(f"{line}room for {one.num_rows - 1 - one.num_ids:,} more")
    return "\n".join(lines)
