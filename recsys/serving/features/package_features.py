"""Features in a package: an Arrow file per table, mapped into memory, with an index of its ids.

Features of items that were added since the export are in one more table. Shapes: K keys.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.vocabulary.fixed import ExactVocabulary, is_id_type
from recsys.checkpoint.run_schema import load_run_schema
from recsys.data.items.item_table import plain_values
from recsys.data.parquet.file import column_type, open_parquet
from recsys.data.parquet.values import is_list, one_chunk
from recsys.data.schema import Schema, features_folder
from recsys.data.schema_columns import FeatureTable
from recsys.data.transforms.columns import check_types
from recsys.data.transforms.steps import is_number
from recsys.serving.features.source import FeatureSource, joined_keys, value_columns
from recsys.serving.new_items.added_items import FEATURES, AddedItems
from recsys.serving.new_items.added_items import FOLDER as ADDED
from recsys.serving.package import MANIFEST, Manifest, read_manifest
from recsys.storage.files import atomic_folder, link_or_copy
from recsys.storage.location import Location, errors_at
from recsys.storage.manifest import describe_all, write_signed

FOLDER = "features"


class IndexedRows:
    """Rows of a table, found by their ids."""

    def __init__(self, rows: pa.Table, table: FeatureTable) -> None:
        self.schema = rows.schema
        self.columns = {name: one_chunk(rows[name]) for name in value_columns(table)}
        ids = joined_keys([one_chunk(rows[name]) for name in table.by])
        self._ids = ExactVocabulary(len(ids) + 2)
        if len(ids) and self._ids.extend([ids]) != len(ids):
            raise ValueError(f"features by {table.name}: an id has several rows; keep one")

    def find(self, keys: list[pa.Array]) -> np.ndarray:  # K ids each -> int64 [K], -1: none
        ids = joined_keys(keys)
        rows = np.full(len(ids), -1)
        if not pa.types.is_null(ids.type):
            rows[np.asarray(ids.is_valid())] = self._ids.find(ids.drop_null())
        return rows


# By identity of the file: successive packages share unchanged files, and so their index.
_shared: WeakValueDictionary[tuple[Any, ...], IndexedRows] = WeakValueDictionary()


def _opened(path: Path, table: FeatureTable) -> IndexedRows:
    status = path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    key = status.st_dev, status.st_ino, status.st_size, *times, repr(table)
    if (indexed := _shared.get(key)) is None:
        with pa.memory_map(str(path)) as file:
            indexed = IndexedRows(pa.ipc.open_file(file).read_all(), table)
        _shared[key] = indexed
    return indexed


class PackageFeatures(FeatureSource):
    """Features of a package's own files."""

    def __init__(self, package: Path, schema: Schema, later_rows: pa.Table | None = None) -> None:
        """Open the files; `later_rows`, by the ranked item, replace rows of the files."""
        self.types: dict[str, pa.Schema] = {}
        self._sources: dict[str, list[IndexedRows]] = {}  # of each table; the last ones win
        for table in schema.features:
            sources = [_opened(features_file(package, table), table)]
            self.types[table.name] = sources[0].schema
            if later_rows is not None and table.by == [schema.target_item]:
                sources.append(IndexedRows(later_rows, table))
            self._sources[table.name] = sources

    def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:  # K ids each -> [K]
        columns: dict[str, pa.Array] = {}
        for source in self._sources[table.name]:
            with errors_at(f"features by {table.name}"):
                indices = source.find(keys)
            rows, has_row = pa.array(indices, mask=indices < 0), pa.array(indices >= 0)
            for name, values in source.columns.items():
                latest = values.take(rows)
                is_first = name not in columns
                columns[name] = latest if is_first else pc.if_else(has_row, latest, columns[name])
        return pa.table(columns)


def updated_rows(
    features: PackageFeatures, table: FeatureTable, rows: pa.Table, unix_time: float
) -> tuple[pa.Table, pa.Array]:
    """Return rows with stored values of columns that `rows` lacks, and a mask of changed rows."""
    ids = [plain_values(one_chunk(rows[name])) for name in table.by]
    stored, types = features.read(table, ids), features.types[table.name]
    columns = dict(zip(table.by, ids, strict=True))
    for name in value_columns(table):
        kind = types.field(name).type
        if name in rows.column_names:
            columns[name] = _cast_to(one_chunk(rows[name]), kind, name)
        elif name.removesuffix("@") in rows.column_names:  # the time of such a value
            columns[name] = pa.array([int(unix_time * 1_000_000)] * len(rows), pa.int64())
        else:
            columns[name] = one_chunk(stored[name])
    updated = pa.table(columns)
    changes = [
        old != new
        for old, new in zip(stored.to_pylist(), updated.select(stored.column_names).to_pylist())
    ]
    return updated, pa.array(changes, pa.bool_())


def _cast_to(values: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
    """Return values in the type of the package; 7 and "7" are two ids, and none is cast."""
    kinds = [dtype.value_type if is_list(dtype) else dtype for dtype in (values.type, kind)]
    if any(map(pa.types.is_null, kinds)):
        return values if pa.types.is_null(kinds[1]) else values.cast(kind)
    texts = [is_id_type(dtype) and not pa.types.is_integer(dtype) for dtype in kinds]
    is_time = texts[0] and pa.types.is_temporal(kinds[1])  # JSON has times as text
    if texts[0] != texts[1] and not is_time:
        raise ValueError(f"column '{name}' has type {values.type}, but {kind} in the package")
    with errors_at(f"column '{name}'", pa.ArrowException):
        return values.cast(kind)


def features_file(package: Path, table: FeatureTable) -> Path:
    """Return the file of a table in a package."""
    return package / FOLDER / f"{table.name}.arrow"


def write_features(root: Location, schema: Schema, package: Path) -> None:
    """Copy the last known features of a dataset into a package; unusable ones are a ValueError."""
    for table in schema.features:
        names = [*table.by, *value_columns(table)]
        rows = _read(features_folder(root, table), names)
        with errors_at(features_folder(root, table)):
            IndexedRows(rows, table)
        _check_types(schema, table, rows, str(features_folder(root, table)))
        path = features_file(package, table)
        path.parent.mkdir(exist_ok=True)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_table(rows)


def _check_types(schema: Schema, table: FeatureTable, rows: pa.Table, location: str) -> None:
    """Require types that the model's columns can be made of, else each request would fail."""
    kinds = {name: rows.schema.field(name).type for name in rows.column_names}
    known = {name for name, kind in kinds.items() if not pa.types.is_null(kind)}
    for name in known & {*table.times.values()}:
        if not is_number(kinds[name]):
            raise ValueError(
                f"{location}: column '{name}' has type {kinds[name]}; write microseconds since 1970"
            )
    names = [name for name in schema.columns if known >= {*schema.file_columns([name])}]
    check_types(schema, names, kinds.__getitem__, location)


def _read(folder: Location, names: Sequence[str]) -> pa.Table:
    tables = []
    if not folder.exists():
        raise ValueError(
            f"{folder}: no such folder, but schema.yaml has features by these ids; prepare the "
            "data again, write it, or remove them from `features`"
        )
    for file in folder.files(".parquet"):
        with open_parquet(file) as parquet:
            for name in names:
                column_type(parquet, file, name)
            tables.append(parquet.read(columns=list(names)))
    if not tables:
        return pa.schema([(name, pa.null()) for name in names]).empty_table()
    with errors_at(folder, pa.ArrowException):
        rows = pa.concat_tables(tables, promote_options="permissive")
        return pa.table({name: one_chunk(rows[name]) for name in names})


def refresh_features(package: Path, data: str, out: Path) -> Manifest:
    """Write a package with the last known features of a dataset; it appears whole or not at all.

    Features of items that were added to the package are kept if the dataset has none of them.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or name another folder")
    package = package.resolve()  # a link may be replaced meanwhile
    manifest, schema = read_manifest(package, verify=False), load_run_schema(package)
    if not schema.features:
        raise ValueError(f"{package}: looks up no features; export the run with a newer dataset")
    unchanged_files = {
        name: file for name, file in manifest.files.items() if not name.startswith(f"{FOLDER}/")
    }
    with atomic_folder(out) as partial:
        for name in unchanged_files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(package / name, partial / name)
        write_features(Location.of(data), schema, partial)
        changed = [*(partial / FOLDER).iterdir()]
        if (additions := AddedItems.open(package, manifest.added)).features is not None:
            changed.append(partial / ADDED / str(additions.number) / FEATURES)
            _write_missing_features(partial, schema, additions.features, changed[-1])
        created = datetime.now(UTC).isoformat(timespec="seconds")
        described = describe_all(partial, sorted(changed))
        manifest = replace(manifest, files=unchanged_files | described, created=created)
        write_signed(partial / MANIFEST, asdict(manifest))
    return manifest


def _write_missing_features(package: Path, schema: Schema, rows: pa.Table, path: Path) -> None:
    table = next(candidate for candidate in schema.features if candidate.by == [schema.target_item])
    stored = _opened(features_file(package, table), table)
    is_missing = stored.find([one_chunk(rows[schema.target_item])]) < 0
    missing = rows.filter(pa.array(is_missing))
    columns = {name: one_chunk(missing[name]) for name in missing.column_names}
    with errors_at("features of added items"):
        for name in value_columns(table):  # types of the newer dataset
            columns[name] = _cast_to(columns[name], stored.schema.field(name).type, name)
    path.unlink()  # a link to the file of the other package
    pq.write_table(pa.table(columns), path)
