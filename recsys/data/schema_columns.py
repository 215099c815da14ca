"""Columns of a dataset as `schema.yaml` describes them, and the types of raw ids."""

from dataclasses import dataclass, field, fields
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal

import pyarrow as pa

from recsys.data.events.times import duration

# Columns that tables in memory have besides the schema's columns.
ROW_POSITION = "__row_position"  # position of a row in the split, with files sorted by name
RAW_GROUP = "__raw_group"  # raw ids of the group, as a vocabulary may map several ids to one row
TARGETS_BEFORE = "__targets_before"  # number of history items of a row that are targets, too
# Public attributes of torch.nn.ModuleDict, which holds the tables; a list avoids importing torch.
_ATTRIBUTES = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu
    cuda double dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter
    get_submodule half ipu items keys load_state_dict modules mtia named_buffers named_children
    named_modules named_parameters parameters pop register_backward_hook register_buffer
    register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
    set_submodule share_memory smart_apply state_dict to to_empty train training type update values
    xpu zero_grad
"""
MODULE_ATTRIBUTES = frozenset(_ATTRIBUTES.split())
MAX_ROWS = 2**48  # rows of a table: more than any cluster holds


@dataclass
class VocabularySettings:
    """Mapping of raw ids of a table, integers or strings, to its rows."""

    # exact: by the file that `recsys prepare vocabulary` wrote; hash: by hash functions; bounded:
    # by a map that is learned in training.
    kind: Literal["exact", "hash", "bounded"]
    num_hashes: int = 1  # hash: rows that are summed per id
    seed: int = 0  # hash: seed of the functions
    admit_after: int = 1  # bounded: occurrences before an id gets a row
    half_life: float = 10_000.0  # bounded: steps after which the weight of a use is halved


# Settings that each kind of vocabulary has.
VOCABULARY_SETTINGS: dict[str, list[str]] = {
    "exact": [],
    "hash": ["num_hashes", "seed"],
    "bounded": ["admit_after", "half_life"],
}


@dataclass
class Column:
    """One column of the impressions."""

    # extra: a float for auxiliary losses only, may be null; weight: the row's weight; sampled: 1 in
    # rows whose item was drawn as a negative, which do not count as rows of the item.
    kind: Literal["id", "ids", "sequence", "dense", "label", "extra", "weight", "sampled"]
    num_embeddings: int | None = None  # rows of its table: ids lie in [0, num_embeddings)
    shares: str | None = None  # column whose table this one shares
    # Lists parallel to a sequence: ids if they are columns of kind ids, else floats.
    parallel: list[str] = field(default_factory=list)
    vocabulary: VocabularySettings | None = None  # of raw ids; None: ids are rows of the table
    column: str | list[str] | None = None  # columns to transform; default: the column of this name
    transform: list[Any] = field(default_factory=list)  # steps, see recsys.data.transforms.steps
    # Replaces null and NaN of the file, before any step. For a sequence: by list of numbers.
    fill: int | float | str | dict[str, float] | None = None
    nullable: bool = False  # for one of several labels: null if unknown
    # Label: bce (default, 0 or 1), mse or huber (a number), or poisson (a count).
    loss: Literal["bce", "mse", "huber", "poisson"] | None = None

    def sources(self, name: str) -> list[str]:
        return self.column if isinstance(self.column, list) else [self.column or name]


@dataclass(frozen=True)
class HistoryColumns:
    """A sequence of past events, and its parallel lists of `numbers` and of `ids`."""

    name: str
    numbers: list[str]
    ids: list[str]


def check_histories(
    columns: dict[str, Column], histories: list[HistoryColumns], target_item: str
) -> None:
    """Raise a ValueError for unusable sequences, parallel lists, or shared tables."""
    lists = [name for history in histories for name in (*history.numbers, *history.ids)]
    for name in {ROW_POSITION, RAW_GROUP, TARGETS_BEFORE} & {*columns, *lists}:
        raise ValueError(f"column '{name}' has a name of this program's; rename it")
    for name in lists:
        if lists.count(name) > 1:
            raise ValueError(f"parallel list '{name}' is named twice; name it once")
        if name in columns and (columns[name].kind != "ids" or name == target_item):
            raise ValueError(
                f"column '{name}' of kind {columns[name].kind} is named beside a sequence; "
                "a list of ids beside it is of kind ids, and one of floats is no column of its own"
            )
    if histories and columns[histories[0].name].shares != target_item:
        raise ValueError(
            f"column '{histories[0].name}': the first sequence holds past target items; "
            f"write `shares: {target_item}`"
        )
    event_lists = (name for history in histories for name in (history.name, *history.ids))
    events = {target_item, *event_lists}
    for name, column in columns.items():
        if column.shares in columns and (name in events) != (column.shares in events):
            raise ValueError(
                f"column '{name}' cannot share the table of '{column.shares}': the vectors "
                "of the target item, of sequences and of lists beside them are kept one by one, "
                "those of other columns are summed; give it num_embeddings"
            )


@dataclass
class ItemColumn:
    """One column of the items."""

    # other: read by a user-defined modality kind.
    kind: Literal["text", "image", "feature", "category", "other"]
    # For features: a .npy file [items, W] or [items, T, W], relative to the dataset, instead of a
    # column. Its rows follow the items' files, or the ids in another .npy file.
    file: str | None = None
    ids: str | None = None


@dataclass
class Items:
    """The items: the column that holds their id, and their content."""

    id: str
    columns: dict[str, ItemColumn] = field(default_factory=dict)


@dataclass
class FeatureTable:
    """Columns whose values depend on ids; `features/NAME` has the last values of each id."""

    by: list[str]  # columns of ids
    columns: list[str]
    # By column with a column of times, `COLUMN@` in microseconds: the duration after which a value
    # is too old and becomes null; all: never.
    max_age: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)  # list beside a history -> item column

    @property
    def name(self) -> str:
        return "-".join(self.by)

    @property
    def times(self) -> dict[str, str]:
        return {name: f"{name}@" for name in self.max_age}

    @property
    def max_age_micros(self) -> dict[str, int]:
        """Age in microseconds from which a value is too old, by column with a limit."""
        ages = {name: duration(age) for name, age in self.max_age.items()}
        return {name: age for name, age in ages.items() if age is not None}


def check_features(tables: list[FeatureTable], columns: dict[str, Column]) -> None:
    """Raise a ValueError for feature tables whose columns or ids are unusable."""
    listed = [name for table in tables for name in table.columns]
    for table in tables:
        where = f"features by {table.by}"
        if not table.by or not table.columns:
            raise ValueError(f"{where}: names no id, or no column; name both")
        for name in table.by:
            if "/" in name or name.startswith("."):
                raise ValueError(f"{where}: '{name}' is no part of a file's name; rename it")
        for name in table.columns:
            kind = columns[name].kind if name in columns else "dense"
            if listed.count(name) > 1 or name in table.by or kind not in ("id", "ids", "dense"):
                raise ValueError(
                    f"{where}: '{name}' is looked up already, or no feature; name it once"
                )
        if unknown := table.max_age.keys() - set(table.columns):
            raise ValueError(
                f"{where}: max_age of {sorted(unknown)}, which are none of its columns"
            )
        for age in table.max_age.values():
            duration(age)
    sources = {name: set(table.by) for table in tables for name in table.columns}
    try:
        TopologicalSorter(sources).prepare()
    except CycleError as error:
        raise ValueError(f"features: {error.args[1]} look up each other") from error


def without_empty(content: Any) -> Any:
    """Return `content` without null `columns`, `parallel` and `transform`: YAML's empty keys."""
    if not isinstance(content, dict):
        return content
    return {
        key: without_empty(value)
        for key, value in content.items()
        if value is not None or key not in ("columns", "parallel", "transform")
    }


@dataclass(frozen=True)
class IdType:
    """Type of the raw ids of a table, or of inputs of `cross`; 7 and "7" are different ids."""

    name: Literal["integer", "string", "boolean"]
    file: str  # the file read first, for messages


def id_type(kind: pa.DataType) -> Literal["integer", "string", "boolean"]:
    """Return the type of raw ids for an Arrow type that `is_id_type` accepts, or for booleans."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_boolean(kind):
        return "boolean"
    return "integer" if pa.types.is_integer(kind) else "string"


def check_vocabulary(column: Column, where: str, is_target: bool) -> None:
    """Raise a ValueError for unusable vocabulary settings; `where` names file and column."""
    settings = column.vocabulary
    assert settings is not None
    if column.num_embeddings is None:
        raise ValueError(
            f"{where} shares '{column.shares}' and its vocabulary; give the vocabulary there"
        )
    for setting in fields(settings):
        is_set = getattr(settings, setting.name) != setting.default
        if setting.name not in ["kind", *VOCABULARY_SETTINGS[settings.kind]] and is_set:
            raise ValueError(
                f"{where}: a vocabulary of kind {settings.kind} has no {setting.name}; remove it"
            )
    for name, limit in (("num_hashes", 64), ("admit_after", 2**31)):
        if not 1 <= (value := getattr(settings, name)) <= limit:
            raise ValueError(f"{where}: {name} is {value}; set 1 to {limit}")
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"{where}: seed is {settings.seed}; set one from 0 to {2**63 - 1}")
    if not settings.half_life > 0:
        raise ValueError(f"{where}: half_life is {settings.half_life}; set a positive number")
    if settings.kind != "hash" and column.num_embeddings < 2:
        raise ValueError(
            f"{where}: num_embeddings is 1, but the last row is that of unknown ids; set at least 2"
        )
    if is_target and settings.num_hashes > 1:
        raise ValueError(
            f"{where} is the target item, whose content is kept by row: it cannot have several "
            "hashes; choose kind exact or bounded, or hash with num_hashes 1"
        )


def table_name_problem(name: str) -> str | None:
    """Return why a column with an id table cannot have this name, and the fix; None if it can."""
    if not name or "." in name:
        return "is part of a parameter's name, which a dot would end; rename the column"
    if name in MODULE_ATTRIBUTES:
        return (
            "is an attribute of torch.nn.ModuleDict, in which the tables are; rename the column, "
            f"for instance to '{name}_id'"
        )
    return None


def check_column(columns: dict[str, Column], name: str, target_item: str) -> None:
    """Raise a ValueError if the keys of one column do not fit together."""
    column, where = columns[name], f"column '{name}'"
    if problem := _fill_problem(columns, name, column):
        raise ValueError(f"{where}: fill {problem}")
    if column.kind in ("dense", "label", "extra", "weight", "sampled"):
        if column.num_embeddings or column.shares or column.parallel or column.vocabulary:
            raise ValueError(f"{where} of kind {column.kind} takes no further key")
        return
    if column.parallel and column.kind != "sequence":
        raise ValueError(f"{where}: only a sequence has parallel lists")
    if (column.num_embeddings is None) == (column.shares is None):
        raise ValueError(f"{where} needs either num_embeddings or shares; set one")
    if (size := column.num_embeddings) is not None:
        if (problem := table_name_problem(name)) is not None:
            raise ValueError(f"{where}: the name of its table {problem}")
        if not 1 <= size <= MAX_ROWS:
            raise ValueError(f"{where}: num_embeddings is {size}; set 1 to {MAX_ROWS}")
    if column.vocabulary is not None:
        check_vocabulary(column, where, is_target=name == target_item)
    if column.shares is not None:
        other = columns.get(column.shares)
        if other is None or other.num_embeddings is None:
            raise ValueError(
                f"{where} shares '{column.shares}', which has no table of its own; name a column "
                "with num_embeddings"
            )


def _fill_problem(columns: dict[str, Column], name: str, column: Column) -> str | None:
    if column.fill is None:
        return None
    if column.kind == "sequence":
        lists = [list_name for list_name in column.parallel if list_name not in columns]
        if not isinstance(column.fill, dict) or not column.fill.keys() <= set(lists):
            return f"of a sequence maps lists of numbers beside it, {lists}, to a number"
        return None
    if column.kind not in ("id", "dense") or isinstance(column.fill, dict):
        return f"of kind {column.kind} has no effect; only an id, a number or a sequence has one"
    if name not in column.sources(name):
        return "is of a column of the files; write the step fill in its transform"
    if column.kind == "dense" and not column.transform and isinstance(column.fill, str):
        return f"is the text {column.fill!r}; write a number"
    return None


def label_problem(columns: dict[str, Column]) -> str | None:
    """Return an error message on the columns of labels and weights, or None."""
    labels = [name for name, column in columns.items() if column.kind == "label"]
    weights = [name for name, column in columns.items() if column.kind == "weight"]
    sampled = [name for name, column in columns.items() if column.kind == "sampled"]
    if not labels:
        return "no column of kind label; declare the column to predict as one"
    if len(sampled) > 1:
        return f"columns {sampled} are all of kind sampled; keep one"
    if len(weights) > 1:
        return (
            f"columns {weights} are all of kind weight, but a row has one weight; write their "
            "product as one column"
        )
    for name, column in columns.items():
        if column.loss and column.kind != "label":
            return f"column '{name}': only a label has a loss; remove it"
        if column.nullable and (column.kind != "label" or len(labels) < 2):
            return f"column '{name}': only a label beside others is nullable; drop rows without it"
    return None
