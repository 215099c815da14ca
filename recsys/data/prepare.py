"""`recsys prepare vocabulary` and `transforms`: prepare a dataset once, before any training.

Building a vocabulary again appends new ids, so that earlier models stay valid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary, is_id_type
from recsys.config.parser import short
from recsys.data.parquet.file import column_type, open_parquet, read_row_group
from recsys.data.parquet.values import is_list, usable_column, without_views
from recsys.data.schema import Schema, build_hashes, load_schema, read_schema, vocabulary_file
from recsys.data.schema_columns import MAX_ROWS
from recsys.data.transforms.chain import (
    Chain,
    load_fitted,
    set_chain,
    transformed_sources,
    write_fitted,
)
from recsys.data.transforms.columns import TransformedRows, check_types, read_columns
from recsys.storage.location import Location, errors_at

SPLITS = ("train", "valid", "test")
ITEMS = "items"


@dataclass(frozen=True)
class PreparedVocabulary:
    """Result of building or extending the vocabulary of one column."""

    file: Location
    vocabulary: ExactVocabulary
    num_new: int
    num_rows: int  # rows of the table in training
    num_embeddings: int | None  # setting in schema.yaml, if it is too small


def prepare_vocabularies(data: str) -> list[PreparedVocabulary]:
    """Build or extend all vocabularies of the dataset at `data`; an error leaves all unchanged."""
    root = Location.of(data)
    schema = load_schema(root, with_vocabularies=False)
    tables = schema.tables_with("exact")
    if not tables:
        raise ValueError(
            f"{root}/schema.yaml: no column has a vocabulary of kind exact; set it for a column of "
            "raw ids"
        )
    prepared = []
    for table in tables:
        file, vocabulary = vocabulary_file(root, table), ExactVocabulary(MAX_ROWS)
        if file.exists():
            vocabulary = ExactVocabulary.load(file.path, MAX_ROWS, file.arrow)
        num_new = _extend(root, schema, table, vocabulary, (*SPLITS, ITEMS))
        schema.make_room(table, len(vocabulary))
        num_rows, too_few = schema.limit(table), schema.grown.get(table)
        prepared.append(PreparedVocabulary(file, vocabulary, num_new, num_rows, too_few))
    for entry in prepared:
        folder, name = entry.file.path.rsplit("/", 1)
        unfinished = f"{folder}/.{name}.partial"
        entry.file.filesystem.makedirs(folder, exist_ok=True)
        entry.vocabulary.save(unfinished, entry.file.arrow)
        entry.file.filesystem.mv(unfinished, entry.file.path)
    return prepared


def new_ids(
    root: Location, schema: Schema, split: str | None, maps: Mapping[str, ExactVocabulary]
) -> dict[str, pa.Array]:
    """Return by table the ids of a split (None: of the items) that `maps` do not have yet."""
    ids = {}
    for table in schema.tables_with("exact"):
        vocabulary = ExactVocabulary(MAX_ROWS)
        num_known = vocabulary.extend([maps[table].ids]) if table in maps else 0
        _extend(root, schema, table, vocabulary, [split or ITEMS])
        ids[table] = vocabulary.ids.slice(num_known)
    return ids


def _extend(
    root: Location, schema: Schema, table: str, vocabulary: ExactVocabulary, folders: Sequence[str]
) -> int:
    """Add the ids in some folders to the vocabulary of a table; return the number of new ids."""
    with errors_at(f"vocabulary of column '{table}' in {root}/schema.yaml"):
        return vocabulary.extend(_raw_ids(root, schema, table, vocabulary, folders))


def _raw_ids(
    root: Location, schema: Schema, table: str, vocabulary: ExactVocabulary, folders: Sequence[str]
) -> Iterator[pa.Array]:
    """Yield the non-null ids of a table, one row group of one column at a time."""
    columns = [name for name in schema.columns if schema.table_of(name) == table]
    splits = [folder for folder in folders if folder != ITEMS]
    sources = [(split, name) for split in splits for name in columns]
    if ITEMS in folders and schema.items is not None and table == schema.target_item:
        sources.append((ITEMS, schema.items.id))
    if splits and not any((root / split).files(".parquet") for split in splits):
        raise ValueError(f"{root}: no *.parquet files in {', '.join(splits)}; write the rows first")
    for folder, name in sources:
        is_of_rows = folder != ITEMS
        takes_lists = is_of_rows and schema.columns[name].kind in ("ids", "sequence")
        for file in (root / folder).files(".parquet"):
            for chunk in _chunks(file, name, schema if is_of_rows else None):
                if pa.types.is_null(chunk.type.value_type if is_list(chunk.type) else chunk.type):
                    continue  # only nulls or empty lists
                if is_list(chunk.type) != takes_lists:
                    expected = "a list of ids" if takes_lists else "one id per row"
                    raise ValueError(
                        f"{file}: column '{name}' has type {chunk.type}, expected {expected}; "
                        "write it so, or change its kind in schema.yaml"
                    )
                ids = chunk.flatten() if takes_lists else chunk
                with errors_at(f"{file}: column '{name}'"):
                    if not is_id_type(ids.type):
                        raise ValueError(
                            f"type {ids.type}, expected integer or string; write it so"
                        )
                    vocabulary.check_type(ids.type)
                yield without_views(ids).drop_null()


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


def format_prepared(prepared: list[PreparedVocabulary]) -> str:
    """Return a line of text for each vocabulary."""
    lines = []
    for entry in prepared:
        num_ids = len(entry.vocabulary)
        line = f"{entry.file}: {num_ids:,} ids, {entry.num_new:,} of them new; "
        if entry.num_embeddings is not None:
            line += f"its table grows from {entry.num_embeddings:,} to {entry.num_rows:,} rows; "
        lines.append(f"{line}room for {entry.num_rows - 1 - num_ids:,} more")
    return "\n".join(lines)


def prepare_transforms(data: str) -> dict[str, Chain]:
    """Fit the transforms of the dataset at `data`, write its `transforms.yaml` and return them."""
    root = Location.of(data)
    chains = fit_transforms(root)
    if not chains:
        raise ValueError(f"{root}/schema.yaml: no transform needs fitted values; nothing to do")
    return chains


def fit_transforms(root: Location) -> dict[str, Chain]:
    """Fit and write transforms as `prepare_transforms`; {} if no transform needs fitted values."""
    schema = read_schema(root)
    if not _steps_to_fit(schema.transforms):
        return {}
    fit_chains(root, schema, "train")
    write_fitted(schema.transforms, root)
    return schema.transforms


def fit_chains(root: Location, schema: Schema, folder: str) -> None:
    """Fit all unfitted steps of a schema's transforms to the rows in a folder."""
    chains = schema.transforms
    while steps := _steps_to_fit(chains):
        fits = {name: chains[name].steps[number].start_fit() for name, number in steps.items()}
        for rows in _rows(root / folder, schema, list(steps)):
            for name, number in steps.items():
                values = rows.before_step(name, number)
                values = values.flatten() if is_list(values.type) else values
                numbers = values.cast(pa.float64(), safe=False).drop_null().to_numpy(False)
                if np.isfinite(numbers).any():
                    fits[name].add(numbers[np.isfinite(numbers)])
        for name, number in steps.items():
            if not fits[name].num_values:
                raise ValueError(f"{root / folder}: column '{name}' has no finite value to fit")
            chains[name] = chains[name].fitted(number, fits[name].result())
    for name, chain in chains.items():
        set_chain(schema.columns[name], chain)


def check_transformed(root: Location) -> None:
    """Raise a ValueError if a transform of any row yields a value that training would refuse."""
    schema = read_schema(root)
    load_fitted(schema.transforms, schema.columns, root, required=True)
    build_hashes(schema)
    for split in SPLITS if schema.transforms else ():
        first = 0
        for rows in _rows(root / split, schema, list(schema.transforms)):
            refuse = partial(_refuse, split, first)
            for name in schema.transforms:
                usable_column(pa.table({name: rows.column(name)}), name, schema, refuse)
            first += rows.table.num_rows


def _refuse(
    split: str, first: int, name: str, bad: np.ndarray, reason: str, message: Callable[[int], str]
) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"transforms: '{name}', row {first + row} of {split}: after its steps {message(row)}; "
            "or end the steps with fill or clip"
        )


def format_fitted(chains: dict[str, Chain]) -> str:
    """Return a line for each fitted step."""
    lines = []
    for name, chain in chains.items():
        for step in chain.steps:
            if step != step.without_fit:
                settings = [f"{key} {short(step.settings[key])}" for key in step.fitted_settings]
                lines.append(f"{name}: {step.name}: {', '.join(settings)}")
    return "\n".join(lines)


def _steps_to_fit(chains: Mapping[str, Chain]) -> dict[str, int]:
    """Return the next step to fit of each chain whose source chains are all fitted."""

    def is_ready(name: str) -> bool:
        sources = transformed_sources(name, chains)
        return all(chains[source].unfitted is None and is_ready(source) for source in sources)

    numbers = {name: chain.unfitted for name, chain in chains.items() if is_ready(name)}
    return {name: number for name, number in numbers.items() if number is not None}


def _rows(folder: Location, schema: Schema, names: Sequence[str]) -> Iterator[TransformedRows]:
    files = folder.files(".parquet")
    if not files:
        raise ValueError(f"{folder}: no *.parquet files; transforms are fitted on them")
    for file in files:
        with open_parquet(file) as parquet:
            check_types(schema, names, partial(column_type, parquet, file), str(file))
            for index in range(parquet.num_row_groups):
                table = read_row_group(parquet, file, index, schema.file_columns(names))
                yield TransformedRows(table, schema, str(file))
