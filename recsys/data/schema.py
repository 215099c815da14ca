"""A dataset's `schema.yaml`, which describes its columns; `README.md` documents the format.

A dataset is a folder or fsspec URL with `schema.yaml`, `train/ valid/ test/*.parquet` (one row per
impression) and `items/*.parquet` (one row per item). Other columns of the files are ignored.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary, HashVocabulary
from recsys.config.parser import settings_of
from recsys.config.plain_yaml import cached_copy, load_plain_yaml
from recsys.data.schema_columns import (
    MAX_ROWS,
    Column,
    FeatureTable,
    HistoryColumns,
    IdType,
    Items,
    VocabularySettings,
    check_column,
    check_features,
    check_histories,
    id_type,
    label_problem,
    without_empty,
)
from recsys.data.transforms.chain import Chain, chains_of, file_columns, load_fitted
from recsys.storage.location import Location, errors_at

FREE_SHARE = 4  # a table that grows gets one free row for every four ids


@dataclass
class Schema:
    """Meaning of a dataset's columns; ids are rows of tables unless they have a `vocabulary`."""

    target_item: str  # the column of kind id that is ranked
    group: str  # the column of kind id whose AUC is averaged in GAUC
    columns: dict[str, Column]
    items: Items | None = None
    features: list[FeatureTable] = field(default_factory=list)  # requests may omit their columns
    # By table: exact and hash vocabularies, which exist before training.
    vocabularies: dict[str, ExactVocabulary | HashVocabulary] = field(
        default_factory=dict, init=False
    )
    # By table with a vocabulary: the type of its raw ids, set when a file with them is opened.
    id_types: dict[str, IdType] = field(default_factory=dict, init=False)
    transforms: dict[str, Chain] = field(default_factory=dict, init=False)  # by column
    # By table that grew because its ids need more rows: num_embeddings in schema.yaml.
    grown: dict[str, int] = field(default_factory=dict, init=False)

    def of_kind(self, kind: str) -> list[str]:
        return [name for name, column in self.columns.items() if column.kind == kind]

    @property
    def histories(self) -> list[HistoryColumns]:
        """The sequences of past events; backbones and content read items of the first sequence."""
        columns = self.columns
        return [
            HistoryColumns(
                name,
                [list_name for list_name in column.parallel if list_name not in columns],
                [list_name for list_name in column.parallel if list_name in columns],
            )
            for name, column in columns.items()
            if column.kind == "sequence"
        ]

    @property
    def history(self) -> str | None:
        """Name of the first sequence, which holds past target items, if there is one."""
        return next(iter(self.of_kind("sequence")), None)

    @property
    def fills(self) -> dict[str, int | float | str]:
        """Values that replace null, by column of the files and by list beside a sequence."""
        fills: dict[str, int | float | str] = {}
        for name, column in self.columns.items():
            if column.fill is not None:
                fills |= column.fill if isinstance(column.fill, dict) else {name: column.fill}
        return fills

    @property
    def event_columns(self) -> list[str]:
        return [name for history in self.histories for name in (history.name, *history.ids)]

    @property
    def weight(self) -> str | None:
        return next(iter(self.of_kind("weight")), None)

    @property
    def sampled(self) -> str | None:
        return next(iter(self.of_kind("sampled")), None)

    @property
    def label_losses(self) -> tuple[str, ...]:
        """Loss of each label, in the order of the schema: bce, mse, huber or poisson."""
        return tuple(self.columns[name].loss or "bce" for name in self.of_kind("label"))

    @property
    def num_items(self) -> int:
        return self.limit(self.target_item)

    @property
    def has_bounded_items(self) -> bool:
        """Whether items have a bounded vocabulary, so that counts and content use raw ids."""
        return self.target_item in self.tables_with("bounded")

    @property
    def item_id_limit(self) -> int | None:
        """Upper bound of item ids in counts and content; None: any 64-bit integers."""
        return None if self.has_bounded_items else self.num_items

    def lookup_of(self, name: str) -> FeatureTable | None:
        """Return the feature table in which a column is looked up, or None."""
        return next((table for table in self.features if name in table.columns), None)

    def lookup_of_list(self, name: str) -> FeatureTable | None:
        """Return the feature table in which a list beside a history is looked up, or None."""
        return next((table for table in self.features if name in table.beside), None)

    def is_of_items(self, name: str) -> bool:
        """Return whether a column is the target item or looked up by it: it varies by candidate."""
        ids = table.by if (table := self.lookup_of(name)) else []
        return name == self.target_item or any(map(self.is_of_items, ids))

    def table_of(self, name: str) -> str:
        return self.columns[name].shares or name

    def limit(self, name: str) -> int:
        """Return the number of rows of the table of column `name`."""
        num_embeddings = self.columns[self.table_of(name)].num_embeddings
        assert num_embeddings is not None
        return num_embeddings

    def vocabulary_of(self, name: str) -> VocabularySettings | None:
        """Return the settings that map raw ids of column `name` to rows; None if ids are rows."""
        return self.columns[self.table_of(name)].vocabulary if name in self.columns else None

    def rows_per_id(self, name: str) -> int:
        """Return the number of table rows that each id of column `name` has."""
        vocabulary = self.vocabulary_of(name)
        return 1 if vocabulary is None else vocabulary.num_hashes

    def tables_with(self, kind: Literal["exact", "hash", "bounded"]) -> list[str]:
        vocabularies = ((name, column.vocabulary) for name, column in self.columns.items())
        return [name for name, settings in vocabularies if settings and settings.kind == kind]

    @property
    def parallel(self) -> list[str]:
        return self.histories[0].numbers if self.history else []

    def make_room(self, table: str, num_ids: int) -> None:
        """Enlarge a table with too few rows for `num_ids` ids, with free rows for later ids."""
        rows = self.limit(table)
        if num_ids >= rows:
            self.grown.setdefault(table, rows)
            self.columns[self.table_of(table)].num_embeddings = num_ids + 1 + num_ids // FREE_SHARE

    def file_columns(self, names: Iterable[str]) -> list[str]:
        return file_columns(names, self.transforms)

    def require_id_type(self, name: str, kind: pa.DataType, file: str, table: str) -> None:
        """Raise a ValueError if raw ids have another type than in other files of their table."""
        first = self.id_types.setdefault(table, IdType(id_type(kind), file))
        if first.name != id_type(kind):
            raise ValueError(
                f"{file}: column '{name}' has {id_type(kind)} ids ({kind}), but {first.file} has "
                f"{first.name} ids of '{table}', and a vocabulary takes 7 and '7' for two ids; "
                f"write the column with {first.name} ids"
            )


def vocabulary_file(root: Location, table: str) -> Location:
    """Return the file with a dataset's exact vocabulary of a table."""
    return root / "vocabulary" / f"{table}.parquet"


def features_folder(root: Location, table: FeatureTable) -> Location:
    """Return the folder with the last known values of a dataset's feature table."""
    return root / "features" / table.name


def load_schema(root: Location, with_vocabularies: bool = True) -> Schema:
    """Read and check `schema.yaml` of the dataset at `root`, its vocabularies and transforms.

    Without `with_vocabularies`, vocabularies and fitted values need not exist yet.
    """
    schema = read_schema(root)
    load_fitted(schema.transforms, schema.columns, root, required=with_vocabularies)
    if with_vocabularies:
        load_vocabularies(schema, root)
    return schema


def read_schema(root: Location) -> Schema:
    """Read and check only `schema.yaml`, without vocabularies and fitted values."""
    path = root / "schema.yaml"
    if not path.exists():
        raise ValueError(f"{path}: no such file; write it, or correct the path of the dataset")
    with errors_at(path, Exception):
        content = load_plain_yaml(path.read_bytes())
    return parse_schema(content, str(path))


def parse_schema(content: Any, file: str) -> Schema:
    """Return the schema of the content of a `schema.yaml`; `file` names the file in errors."""
    with errors_at(file, Exception):
        schema = _schema_of(content)
    _validate(schema, file)
    return schema


@cached_copy
def _schema_of(content: Any) -> Schema:
    if not isinstance(content, dict):
        raise ValueError("it must be a mapping with target_item, group and columns")
    return settings_of(Schema, without_empty(content))


def load_vocabularies(
    schema: Schema, root: Location, fix: str | None = None, is_of_run: bool = False
) -> dict[str, int]:
    """Load exact vocabularies from `root`, and build hash vocabularies.

    `fix` ends the error about a missing file. Tables that are too small grow. A run's tables keep
    their size, and ids that do not fit are unknown: returns the number of these by table.
    """
    fix = fix or f"run `recsys prepare vocabulary --data {root}`"
    num_later: dict[str, int] = {}
    for table in schema.tables_with("exact"):
        file = vocabulary_file(root, table)
        if not file.exists():
            raise ValueError(
                f"{file}: no such file, but column '{table}' has a vocabulary of kind exact; {fix}"
            )
        stored = ExactVocabulary.load(file.path, MAX_ROWS, file.arrow)
        if not is_of_run:
            schema.make_room(table, len(stored))
        schema.vocabularies[table] = vocabulary = stored.resized(schema.limit(table))
        if len(vocabulary) < len(stored):
            num_later[table] = len(stored) - len(vocabulary)
    build_hashes(schema)
    return num_later


def advice_on_unknown(schema: Schema, table: str, root: Location) -> str:
    """Return how to give unknown ids rows, for a table with an exact vocabulary."""
    ids, command = schema.vocabularies[table], f"run `recsys prepare vocabulary --data {root}`"
    assert isinstance(ids, ExactVocabulary)
    if len(ids) < ids.unknown_row:
        return command
    return f"{command}; a run whose table is full needs `recsys train --warm-start RUN`, too"


def format_growth(schema: Schema) -> list[str]:
    """Return a line for each table that has more rows than in `schema.yaml`."""
    return [
        f"table '{table}' has {schema.limit(table):,} rows: num_embeddings of schema.yaml, "
        f"{rows:,}, is too few for {len(ids):,} ids"
        for table, rows in schema.grown.items()
        if isinstance(ids := schema.vocabularies[table], ExactVocabulary)
    ]


def build_hashes(schema: Schema) -> None:
    """Build the hash vocabularies of a schema, which need no file."""
    for table in schema.tables_with("hash"):
        settings, num_rows = schema.vocabulary_of(table), schema.limit(table)
        assert settings is not None
        schema.vocabularies[table] = HashVocabulary(num_rows, settings.num_hashes, settings.seed)


def _validate(schema: Schema, path: str) -> None:
    columns, target, id_columns = schema.columns, schema.target_item, schema.of_kind("id")
    with errors_at(path):
        for role, name in (("target_item", target), ("group", schema.group)):
            if name not in id_columns:
                cause = f"{role} is '{name}', which is no column of kind id"
                raise ValueError(f"{cause}; name one of {id_columns}")
        if columns[target].num_embeddings is None:
            raise ValueError(f"target_item '{target}' needs its own num_embeddings")
        if problem := label_problem(columns):
            raise ValueError(problem)
        for name in columns:
            check_column(columns, name, target)
        check_histories(columns, schema.histories, target)
    schema.transforms = chains_of(columns, target, path)
    with errors_at(path):
        check_features(schema.features, columns)
        for name, content in schema.items.columns.items() if schema.items else ():
            if content.file is not None and content.kind != "feature":
                raise ValueError(f"item column '{name}': only a feature has a file; remove it")
            if content.ids is not None and content.file is None:
                raise ValueError(f"item column '{name}': ids are those of a file; name it, too")
