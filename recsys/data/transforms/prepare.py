"""`recsys prepare transforms`: fit the steps of a dataset's columns on its training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from recsys.config.parser import short
from recsys.data.parquet.file import column_type, open_parquet, read_row_group
from recsys.data.parquet.values import is_list, usable_column
from recsys.data.prepare_vocabulary import SPLITS
from recsys.data.schema import Schema, build_hashes, read_schema
from recsys.data.transforms.chain import (
    Chain,
    load_fitted,
    set_chain,
    transformed_sources,
    write_fitted,
)
from recsys.data.transforms.columns import TransformedRows, check_types
from recsys.storage.location import Location


def prepare_transforms(data: str) -> dict[str, Chain]:
    """Fit the transforms of the dataset at `data`, write its `transforms.yaml` and return them."""
    root = Location.of(data)
    chains = fit_transforms(root)
    if not chains:
        raise ValueError(f"{root}/schema.yaml: no transform needs fitted values; nothing to do")
    return chains


def fit_transforms(root: Location) -> dict[str, Chain]:
    """Do `prepare_transforms`; do nothing if no transform needs fitted values."""
    schema = read_schema(root)
    if not _unfitted(schema):
        return {}
    fit_chains(root, schema, "train")
    write_fitted(schema.transforms, root)
    return schema.transforms


def fit_chains(root: Location, schema: Schema, folder: str) -> None:
    """Fit the steps of a schema's columns that are not fitted on the rows in a folder."""
    while unfitted := _unfitted(schema):
        ready = {
            name: number for name, number in unfitted.items() if not _reads_unfitted(schema, name)
        }
        _fit(root, schema, folder, ready)
    for name, chain in schema.transforms.items():
        set_chain(schema.columns[name], chain)


def check_transformed(root: Location) -> None:
    """Apply the transforms of a dataset to all rows; name a value that training would refuse."""
    schema = read_schema(root)
    load_fitted(schema.transforms, schema.columns, root, required=True)
    build_hashes(schema)
    for split in SPLITS if schema.transforms else ():
        first = 0

        def refuse(
            column: str, bad: np.ndarray, reason: str, message: Callable[[int], str]
        ) -> None:
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(
                    f"transforms: '{column}', row {first + row} of {split}: after its steps "  # noqa: B023
                    f"{message(row)}; or end the steps with fill or clip"
                )

        for rows in _rows(root / split, schema, list(schema.transforms)):
            for name in schema.transforms:
                usable_column(pa.table({name: rows.column(name)}), name, schema, refuse)
            first += rows.table.num_rows


def format_fitted(chains: dict[str, Chain]) -> str:
    """Return a line for each fitted step."""
    lines = []
    for name, chain in chains.items():
        for step, bare in zip(chain.steps, chain.without_fit.steps, strict=True):
            if step != bare:
                parts = [f"{part} {short(step.settings[part])}" for part in step.fitted_settings]
                lines.append(f"{name}: {step.name}: {', '.join(parts)}")
    return "\n".join(lines)


def _unfitted(schema: Schema) -> dict[str, int]:
    numbers = {name: chain.unfitted for name, chain in schema.transforms.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _reads_unfitted(schema: Schema, name: str) -> bool:
    chains = schema.transforms
    return any(
        chains[source].unfitted is not None or _reads_unfitted(schema, source)
        for source in transformed_sources(name, chains)
    )


def _fit(root: Location, schema: Schema, folder: str, steps: Mapping[str, int]) -> None:
    chains = schema.transforms
    fits = {name: chains[name].steps[number].start_fit() for name, number in steps.items()}
    for rows in _rows(root / folder, schema, list(steps)):
        for name, number in steps.items():
            values = rows.before_step(name, number)
            values = values.flatten() if is_list(values.type) else values
            numbers = values.cast(pa.float64(), safe=False).drop_null()
            fits[name].add(numbers.to_numpy(zero_copy_only=False))
    for name, number in steps.items():
        if not fits[name].num_values:
            raise ValueError(f"{root / folder}: column '{name}' has no finite value to fit")
        chains[name] = chains[name].fitted(number, fits[name].result())


def _rows(folder: Location, schema: Schema, names: Sequence[str]) -> Iterator[TransformedRows]:
    files = folder.files(".parquet")
    if not files:
        raise ValueError(f"{folder}: no *.parquet files; transforms are fitted on them")
    columns = schema.file_columns(names)
    for file in files:
        with open_parquet(file) as parquet:
            kinds = {column: column_type(parquet, file, column) for column in columns}
            check_types(schema, names, kinds.__getitem__, str(file))
            for index in range(parquet.num_row_groups):
                table = read_row_group(parquet, file, index, columns)
                yield TransformedRows(table, schema, str(file))
