"""Read an `events.yaml`, and check that its settings fit together before any log is read."""

import math
import os
from collections.abc import Iterable, Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from zoneinfo import available_timezones

import numpy as np

from recsys.config.parser import settings_of, short
from recsys.config.plain_yaml import cached_copy, load_plain_yaml, recipe_file
from recsys.data.events.clean_events import event_columns
from recsys.data.events.file_columns import LARGEST
from recsys.data.events.settings import IMPRESSION, EventsConfig, EventTable, ItemTable, Source
from recsys.data.events.sql import literal
from recsys.data.events.times import duration, form_problem, moment
from recsys.data.schema_columns import (
    RAW_GROUP,
    ROW_POSITION,
    Column,
    check_vocabulary,
    table_name_problem,
)
from recsys.data.transforms.chain import KINDS, chains_of, file_columns
from recsys.storage.files import home_expanded

LONGEST_NAME = 200  # bytes of a column's name, which may also name a file
# Settings where text may abbreviate a mapping {KEY: TEXT}, and settings where it may be a list.
SHORT = {
    **{f"/{table}/*": "kind" for table in ("context", "items/columns", "users/columns")},
    "/items/content/*": "kind",
    "/histories/*/parallel/*": "column",
}
LISTS = (
    *("/rows", "/late", "/labels/*/action", "/histories/*/actions"),
    *("/counts/*/of", "/counts/*/actions", "/counts/*/per"),
)


def load_events_config(path: Path, data: Path | None = None) -> EventsConfig:
    """Read an events.yaml; its relative paths start at `data`, by default its own folder."""
    path = recipe_file(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name an events.yaml")
    try:
        config = _settings_of(load_plain_yaml(path.read_bytes()))
        _resolve_paths(config, path.parent if data is None else data)
        if (conflict := next(_conflicts(config), None)) is not None:
            raise ValueError(conflict)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    return config


@cached_copy
def _settings_of(content: Any) -> EventsConfig:
    if not isinstance(content, dict):
        raise ValueError("it must be a mapping with events and labels")
    return settings_of(EventsConfig, _written_out(content))


def _written_out(content: Any, path: tuple[str, ...] = ()) -> Any:
    """Return settings with the abbreviations of `SHORT` and `LISTS` written out."""
    if isinstance(content, date):  # YAML reads unquoted dates as such
        return content.isoformat()
    if isinstance(content, dict):
        content = {
            name: _written_out(value, (*path, str(name).replace("/", "_") or "_"))
            for name, value in content.items()
        }
    position = PurePosixPath("/", *path)
    if isinstance(content, int | str | list) and any(map(position.match, LISTS)):
        return [_text(value) for value in (content if isinstance(content, list) else [content])]
    if isinstance(content, list):
        return [_written_out(value, path) for value in content]
    if isinstance(content, str):
        return next(
            ({key: content} for pattern, key in SHORT.items() if position.match(pattern)), content
        )
    return content


def _text(action: Any) -> Any:
    """Return an action as text, even if YAML has read it as a number or a truth value."""
    text = str(action).lower() if isinstance(action, bool) else str(action)
    return text if isinstance(action, int) else action


def _resolve_paths(config: EventsConfig, folder: Path) -> None:
    for _, source in _sources(config):
        paths = [source.path] if isinstance(source.path, str) else source.path
        source.path = [
            path if "://" in path else os.path.realpath(folder / home_expanded(path))
            for path in paths
        ]
    for content in config.items.content.values() if config.items is not None else ():
        if content.path_column is not None and "://" not in (content.folder or ""):
            content.folder = os.path.realpath(folder / (content.folder or ""))


def _sources(config: EventsConfig) -> Iterator[tuple[str, Source]]:
    yield from ((f"events.{name}", table) for name, table in config.events.items())
    for name in ("impressions", "items", "users"):
        if (table := getattr(config, name)) is not None:
            yield name, table


def _conflicts(config: EventsConfig) -> Iterator[str]:
    """Yield error messages on settings that do not fit; a check relies on earlier checks."""
    for required in ("events", "labels"):
        if not getattr(config, required):
            yield f"{required} is empty; name at least one"
    if IMPRESSION in config.events:
        yield f"events: '{IMPRESSION}' is the name of the action of impressions; rename the table"
    for name, source in _sources(config):
        yield from _source_problems(name, source)
    yield from _name_problems(config)
    yield from _transform_problems(config)
    yield from _column_problems(config)
    yield from _label_problems(config)
    yield from _weight_problems(config)
    yield from _request_problems(config)
    for setting, actions in config.actions.items():
        if actions == []:
            yield f"{setting} is empty; name an action, or leave it out"
        for action in actions or ():
            literal(action)
    yield from _history_problems(config)
    yield from _count_problems(config)
    yield from _split_problems(config)
    if (events := config.drop.max_events_per_user) is not None and events < 1:
        yield f"drop: max_events_per_user is {events}; set at least 1"
    if duration(config.drop.late_rows) is None:
        yield f"drop: late_rows is {config.drop.late_rows}; write a duration such as 7d"
    if not 0 <= config.vocabulary.headroom <= 100:
        yield f"vocabulary: headroom is {config.vocabulary.headroom}; set 0 to 100"
    if config.drop.later_than is not None:
        moment(config.drop.later_than, config.time_zone)
    if config.rows is not None and config.impressions is not None:
        yield "rows: impressions are the rows already; remove rows or impressions"
    yield from _negatives_problems(config)


def _negatives_problems(config: EventsConfig) -> Iterator[str]:
    if (negatives := config.negatives) is None:
        return
    if config.impressions is not None:
        yield "negatives: impressions have negatives already; take one of both out"
    limits = {"per_positive": (1, 10_000), "seed": (0, 2**43 - 1), "smoothing": (0, 10**6)}
    for name, (lower, upper) in limits.items():
        value = getattr(negatives, name)
        if value is not None and not lower <= value <= upper:
            yield f"negatives: {name} is {value}; set {lower} to {upper}"
    if negatives.smoothing is not None and negatives.by == "uniform":
        yield "negatives: smoothing is of `by: popularity`; set that, or remove it"
    if negatives.available_from is not None and config.items is None:
        yield "negatives: available_from names a column of `items`; add that table, or remove it"
    if negatives.available_from is not None and negatives.events_per_item == 0:
        yield (
            "negatives: with smoothing 0 no item is drawn before its first event; set such as 1, "
            "or remove available_from"
        )


def _source_problems(name: str, source: Source) -> Iterator[str]:
    if not source.path:
        yield f"{name}.path is empty; name at least one file or folder"
    delimiter = "," if source.delimiter is None else source.delimiter
    if len(delimiter.encode()) != 1 or delimiter in '"\r\n\0':
        yield (
            f"{name}.delimiter is {delimiter!r}; write one ASCII character, and no quote or end of "
            "a line"
        )
    several = source.several if isinstance(source, EventTable) else None
    if several is not None and not (several.between and several.separator):
        yield f"{name}.several: between and separator are texts; write some"
    if source.time_zone != "UTC" and source.time_zone not in available_timezones():
        yield f"{name}.time_zone '{source.time_zone}' is unknown; write such as Europe/Berlin"
    if source.time_format is not None and (problem := form_problem(source.time_format)):
        yield f"{name}.time_format '{source.time_format}': {problem}"
    for column, content in source.content.items() if isinstance(source, ItemTable) else ():
        if content.path_column is None and content.folder is not None:
            yield f"items.content.{column}: folder without path_column; set both"
        if content.path_column is not None and content.kind != "image":
            yield f"items.content.{column}: only images have a path_column; remove it"


def column_names(config: EventsConfig) -> list[str]:
    """Return the column names of a dataset's splits."""
    tables = [table.columns for table in (config.items, config.users) if table is not None]
    parallels = [history.parallel for history in config.histories.values()]
    names = [config.output.user, config.output.item, config.output.time]
    names += [config.output.sampled] if config.negatives is not None else []
    names += [config.output.weight] if config.weight is not None else []
    groups: list[Iterable[str]] = [config.context, *tables, config.labels, config.counts]
    groups += [config.late, config.histories, *parallels]
    return names + [name for group in groups for name in group]


def _name_problems(config: EventsConfig) -> Iterator[str]:
    """Yield a problem for repeated column names, and names unfit for files or id tables."""
    names = column_names(config)
    for name in names:
        if not name:
            yield "a column of the dataset has an empty name; name it"
        if name in (ROW_POSITION, RAW_GROUP):
            yield f"'{name}' is a name of this program's; rename the column"
        if "/" in name or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            yield (
                f"{short(repr(name))} names a column of the dataset, and maybe a file; write up to "
                f"{LONGEST_NAME} bytes of printable characters without /"
            )
        if names.count(name) > 1:
            yield f"'{name}' names two columns of the dataset; rename one"
    contents = config.items.content if config.items is not None else {}
    for name in ("", config.output.item):
        if name in contents:
            yield f"items.content: '{name}' is no name, or that of the ids; rename it"
    spellings: dict[str, str] = {}
    for name in dict.fromkeys([*names, *event_columns(config), *contents]):
        if (other := spellings.setdefault(name.lower(), name)) != name:
            yield (
                f"'{other}' and '{name}' differ in capitals alone, which SQL does not tell apart; "
                "rename one"
            )
    ids = [config.output.user, config.output.item]
    ids += [name for name, feature in config.features.items() if feature.kind != "dense"]
    columns = {name: parallel.column for name, parallel in config.parallels.items()}
    lists = [name for name, column in columns.items() if column in (*ids, "action")]
    transforms = [name for name, column in config.transforms.items() if column.kind != "dense"]
    for name in (*ids, *lists, *transforms):
        if (problem := table_name_problem(name)) is not None:
            yield f"'{name}' names a table of ids, and {problem}"
    counted = [*ids, *(name for name, column in columns.items() if column == "action")]
    for name, count in config.vocabulary.min_count.items():
        if name not in counted:
            yield f"vocabulary: min_count of '{name}', which is none of the id columns {counted}"
        if count < 1:
            yield f"vocabulary: min_count of '{name}' is {count}; set at least 1"
    if config.vocabulary.min_count and config.vocabulary.kind == "rows":
        yield "vocabulary: min_count is of kind exact alone; remove it, or set that kind"


def _transform_problems(config: EventsConfig) -> Iterator[str]:
    names = column_names(config)
    for name, column in config.transforms.items():
        where = f"transforms: '{name}'"
        if name in names and name not in (*config.features, *config.counts):
            yield f"{where} names a column that is no feature; rename it"
        if column.kind not in KINDS:
            yield f"{where} is of kind {column.kind}; choose one of {KINDS}"
        if column.kind != "dense" and (column.num_embeddings or 0) < 1:
            yield f"{where}: num_embeddings is {column.num_embeddings}; set its rows"
        if column.vocabulary is not None:
            check_vocabulary(column, where, is_target=False)
            if column.vocabulary.kind == "exact":
                yield f"{where}: a vocabulary of kind exact is of ids alone; use hash"
    columns = {name: Column("label") for name in config.labels} | config.transforms
    chains = chains_of(columns, config.output.item, "transforms")
    for name in config.transforms:
        if name not in chains:
            yield f"transforms: '{name}' has neither column nor transform; add one"
    for name in file_columns(chains, chains):
        if name not in names:
            yield f"transforms: the dataset has no column '{name}', but {names}"


def _column_problems(config: EventsConfig) -> Iterator[str]:
    for source, events in config.events.items():
        for name in events.columns:
            if events.columns.count(name) > 1:
                yield f"events: columns of '{source}' name '{name}' twice; remove one"
    row_columns = {name for table in config.row_tables for name in table.columns}
    event_table_columns = {name for table in config.events.values() for name in table.columns}
    required = dict.fromkeys(config.context, "context")
    required |= {label.column: "labels" for label in config.labels.values() if label.column}
    required |= dict.fromkeys(config.late, "late")
    if config.weight is not None and config.weight.column is not None:
        required[config.weight.column] = "weight"
    for name, setting in required.items():
        if name not in row_columns:
            yield f"{setting}: no table of rows has '{name}' in its `columns`; add it there"
    listed = {parallel.column for parallel in config.parallels.values()}
    derived = {"age", "action", *config.item_features}
    for name in sorted(listed & derived & event_table_columns):
        yield (
            f"parallel: '{name}' is a column of events, and of items or made for each event; "
            "rename it in the file, or leave it out of `columns`"
        )
    for name in event_columns(config):
        if name not in required and name not in event_table_columns:
            yield (
                f"parallel: column '{name}' is not in the `columns` of an event or item table; add "
                "it there"
            )


def _label_problems(config: EventsConfig) -> Iterator[str]:
    for name, label in config.labels.items():
        where = f"labels: '{name}'"
        if (label.action is None) == (label.column is None):
            yield f"{where} needs one of action and column; set exactly one"
        if label.within is not None and label.action is None:
            yield f"{where} of a column has no within; remove it"
        if label.at_least is not None and label.column is None:
            yield f"{where} of an action has no at_least; remove it"
        if label.column in config.context and config.context[label.column].kind != "dense":
            yield f"{where}: column '{label.column}' has ids; name one of numbers"
        if label.within is not None and not duration(label.within):
            yield f"{where}: within is {label.within}; set a duration such as 7d"
        if label.action is not None and label.within is None and config.impressions is not None:
            yield f"{where} of impressions has no within; set one such as 7d"
        if label.at_least is not None and not math.isfinite(label.at_least):
            yield f"{where}: at_least is {label.at_least}; set a finite number"


def _weight_problems(config: EventsConfig) -> Iterator[str]:
    for name in config.late:
        if name in config.context:
            yield f"late: '{name}' is in context, too; a feature is known at its row's moment"
    if (weight := config.weight) is None:
        return
    if (weight.column is None) == (not weight.labels and not weight.actions):
        yield "weight: needs a column, or labels and actions; set one of both"
    if weight.column in config.context and config.context[str(weight.column)].kind != "dense":
        yield f"weight: column '{weight.column}' has ids; name one of numbers"
    for name in weight.labels.keys() - config.labels.keys():
        yield f"weight: labels has '{name}'; name one of {list(config.labels)}"
    for value in (*weight.labels.values(), *weight.actions.values(), weight.drawn):
        if not 0 <= value <= LARGEST:
            yield f"weight: is {value}; a weight is 0 or more"


def _request_problems(config: EventsConfig) -> Iterator[str]:
    """Yield a problem if only some tables of rows and of labelling actions have `request`."""
    actions = {
        name for label in config.labels.values() if label.within for name in label.action or ()
    }
    if config.impressions is None:
        actions |= set(config.events if config.rows is None else config.rows)
    for name, table in config.tables.items() if config.by_request and actions else ():
        is_used = name == IMPRESSION or table.action is not None or name in actions
        if is_used and table.request is None:
            where = "impressions" if name == IMPRESSION else f"events.{name}"
            yield (
                f"{where} has no `request`, but other tables have one, and a row and the actions "
                "that label it agree in it; name its column, or leave `request` out everywhere"
            )


def _history_problems(config: EventsConfig) -> Iterator[str]:
    for name, history in config.histories.items():
        if duration(history.delay) is None:
            yield f"histories: '{name}': delay is {history.delay}; write a duration such as 1h"
        if history.length < 1:
            yield f"histories: '{name}': length is {history.length}; set at least 1"
    features = {**config.context, **config.item_features}
    for name, parallel in config.parallels.items():
        column, settings = parallel.column, (parallel.scale, parallel.fill, parallel.at_least)
        where = f"parallel: '{name}': "
        numbers = [number or 0.0 for number in settings]
        if not np.float32(parallel.scale) or not all(abs(number) <= LARGEST for number in numbers):
            yield (
                f"{where}scale {parallel.scale}, fill {parallel.fill}, at_least "
                f"{parallel.at_least}; set numbers that float32 holds, and scale other than 0"
            )
        kind = features[column].kind if column in features else "dense"
        if kind == "ids":
            yield (
                f"{where}column '{column}' has lists of ids, and an event one value; name a column "
                "of kind id or of numbers"
            )
        if (kind == "id" or column in ("age", "action")) and settings != (1.0, 0.0, None):
            text = f"scale, fill and at_least are of numbers, and '{column}' has none"
            yield f"{where}{text}; remove them"
        if column == "action" and config.vocabulary.kind == "rows":
            yield f"{where}actions cannot be rows of a table; leave it out"


def _count_problems(config: EventsConfig) -> Iterator[str]:
    ids = [name for name, column in config.item_features.items() if column.kind == "id"]
    keys = {"user", "item", *ids}
    for name, count in config.counts.items():
        where = f"counts: '{name}'"
        if duration(count.delay) is None:
            yield f"{where}: delay is {count.delay}; write a duration such as 1h"
        duration(count.max_age)
        if duration(count.within) == 0:
            yield f"{where}: within is {count.within}, which holds no event"
        for key in count.of:
            if key not in keys:
                yield f"{where}: of has '{key}'; name user, item or an id column of items"
        if not count.of:
            yield f"{where}: of is empty; name user, item or both"


def _split_problems(config: EventsConfig) -> Iterator[str]:
    split = config.split
    if split.by == "windows":
        if not 1 <= split.windows <= 8:
            yield f"split: windows is {split.windows}; set 1 to 8"
        return
    if split.by == "leave_last":
        if split.last < 1:
            yield f"split: last is {split.last}; set at least 1"
        return
    if not 2 <= len(split.at) <= (2 if split.by == "user" else 3):
        yield f"split: at has {len(split.at)} values; write the two at which train and valid end"
    if split.by == "dates":
        cuts: list[float] = [moment(str(day), config.time_zone) for day in split.at]
    else:
        if not all(isinstance(share, float | int) and 0 < share <= 1 for share in split.at):
            yield f"split: at is {split.at}; write shares between 0 and 1"
        cuts = [float(share) for share in split.at]
    if any(late <= early for early, late in pairwise(cuts)):
        yield f"split: at is {split.at}; write it in ascending order"
