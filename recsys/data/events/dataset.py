"""Write datasets from the stage `complete`: splits, items, vocabularies and `schema.yaml`."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.data.events.file_columns import Types
from recsys.data.events.histories import add_histories
from recsys.data.events.history_values import AGE, MOMENT, HistoryFiles, slice_columns
from recsys.data.events.last_features import id_features, write_last_features
from recsys.data.events.negatives import DRAWN_AS, ItemPool, add_negatives
from recsys.data.events.parquet_parts import Complete
from recsys.data.events.samples import SPLITS, WEIGHT, Conditions
from recsys.data.events.settings import EventsConfig
from recsys.data.events.snapshots import add_features, add_pictures
from recsys.data.events.sql import SqlEngine, aligned, quoted
from recsys.data.events.times import MICROS
from recsys.data.item_frequency import COLD_BELOW
from recsys.data.prepare import check_transformed, fit_transforms
from recsys.data.schema import vocabulary_file
from recsys.storage.files import link_or_copy
from recsys.storage.location import Location, errors_at

logger = logging.getLogger(__name__)


ITEMS_PER_GROUP = 1024  # rows of a row group, small, since a row may hold pictures
LARGE_TABLE, ROWS_PER_ID = 1 << 24, 1000  # limits of tables whose ids are rows; the larger counts


def complete_samples(
    engine: SqlEngine,
    config: EventsConfig,
    types: Types,
    datasets: Conditions,
    pool: ItemPool | None = None,
    is_daily: bool = False,
) -> tuple[DatasetWriter, dict[str, int]]:
    """Make the stage `complete` from `rows`; return a writer, and samples left out by reason.

    With `is_daily`, there may be no row, the stage `earlier` exists, and `pool` is used.
    """
    stage, reasons = "rows", dict[str, int]()
    if config.negatives is not None:
        datasets, reasons = add_negatives(engine, config, datasets, pool)
        stage = "drawn"
    reasons |= add_features(engine, config, stage, may_be_empty=is_daily)
    lists, files = add_histories(engine, config, types, earlier=is_daily)
    return DatasetWriter(engine, config, datasets, lists, files), reasons


@dataclass(frozen=True)
class DatasetWriter:
    """Writes datasets from the stage `complete`, which has all samples with all columns."""

    engine: SqlEngine
    config: EventsConfig
    datasets: Conditions
    lists: Types  # types of the histories and the lists beside them
    files: HistoryFiles | None  # values of histories, if samples have slices instead of lists

    def write(self, root: Path) -> dict[str, dict[str, Any]]:
        """Write each dataset into a folder with its name; return statistics of each split."""
        statistics: dict[str, dict[str, Any]] = {}
        items: Path | None = None
        for name, conditions in self.datasets.items():
            self._write_dataset(conditions, root / name, items)
            items = root / name / "items"
            by_split = self._statistics(conditions)
            statistics |= {str(Path(name, split)): values for split, values in by_split.items()}
        return statistics

    def _write_dataset(self, conditions: dict[str, str], folder: Path, items: Path | None) -> None:
        """Write a dataset; `schema.yaml` and fitted transforms come last."""
        names, complete = self.columns()
        for split in SPLITS:
            query = (
                f"SELECT {names} FROM complete c WHERE {conditions[split]} "
                "ORDER BY c.ts, c.uid, c.iid, c.position"
            )
            if not self.engine.write(query, folder / split, complete=complete):
                window = f" of {folder.name}" if self.config.split.by == "windows" else ""
                raise ValueError(_no_rows(self.config, split + window))
        train = f"{conditions['train']}{self.is_logged}"
        pq.write_table(self.item_counts(conditions["train"]), folder / "item_counts.parquet")
        sizes = self.write_vocabularies(self._ids(train), folder)
        if self.config.items is not None:
            self._write_items(train, folder, items)
        if items is None:
            time = 1 + self.engine.value(f"max({self.config.arrival})", "clean_events")
            write_last_features(self.engine, self.config, folder / "features", time)
        elif (features := items.parent / "features").exists():
            shutil.copytree(features, folder / "features", copy_function=link_or_copy)
        (folder / "schema.yaml").write_text(self.schema(sizes))
        fit_transforms(Location.of(folder))
        check_transformed(Location.of(folder))

    def item_counts(self, train: str) -> pa.Table:
        """Return the number of training rows of each item, of the SQL condition `train`."""
        return self.engine.table(
            f"SELECT iid AS {quoted(self.config.output.item)}, count(*) AS train_rows "
            f"FROM complete c WHERE {train}{self.is_counted} GROUP BY c.iid ORDER BY c.iid"
        )

    def columns(self) -> tuple[str, Complete]:
        """Return SQL of the columns of rows, and a function that adds histories to batches."""
        config, output, unit = self.config, self.config.output, MICROS[self.config.output.time_unit]
        columns = {output.user: "uid", output.item: "iid"}
        for history_name, history in config.histories.items():
            columns |= {name: quoted(f"h_{name}") for name in (history_name, *history.parallel)}
        for name, feature in config.features.items():
            column = quoted(f"c_{name}")
            columns[name] = f"CAST({column} AS FLOAT)" if feature.kind == "dense" else column
        columns |= {name: f"CAST({quoted(f'n_{name}')} AS FLOAT)" for name in config.counts}
        columns |= {name: f"CAST({quoted(f'l_{name}')} AS FLOAT)" for name in config.labels}
        columns |= {name: f"CAST({quoted(f'late_{name}')} AS FLOAT)" for name in config.late}
        if config.weight is not None:
            columns[output.weight] = f"CAST({quoted(WEIGHT)} AS FLOAT)"
        if config.negatives is not None:
            columns[output.sampled] = f"CAST(CASE WHEN {DRAWN_AS} = 0 THEN 0 ELSE 1 END AS FLOAT)"
        # Round down, also before 1970: SQL's % has the sign of its left side.
        columns[output.time] = f"CAST((ts - (ts % {unit} + {unit}) % {unit}) / {unit} AS BIGINT)"
        if self.files is None:
            return aligned(columns, columns), None
        read = {name: sql for name, sql in columns.items() if name not in self.lists}
        read |= {name: quoted(name) for name in slice_columns(config.histories)}
        read[MOMENT] = "ts"
        return aligned(read, read), partial(self.files.with_lists, columns=list(columns))

    @property
    def is_logged(self) -> str:
        """SQL condition, starting with AND, that excludes drawn negatives."""
        return f" AND {DRAWN_AS} = 0" if self.config.negatives is not None else ""

    @property
    def is_counted(self) -> str:
        """SQL condition that also excludes rows of weight 0: in a run they count for no item."""
        has_weight = f" AND {quoted(WEIGHT)} > 0" if self.config.weight is not None else ""
        return f"{self.is_logged}{has_weight}"

    def _write_items(self, train: str, folder: Path, other: Path | None) -> None:
        """Write each item's content as of the last training row, or link the files of `other`."""
        table, name = self.config.items, self.config.output.item
        assert table is not None
        min_count = self.config.vocabulary.min_count.get(name, 1)
        if other is not None and min_count <= 1 and table.valid_from is None:
            shutil.copytree(other, folder / "items", copy_function=link_or_copy)
            return
        end = self.engine.value("max(ts)", f"complete WHERE {train}")
        frequent = ""
        if min_count > 1:
            frequent = f" AND id IN ({_frequent(self._ids(train)[name], min_count)})"
        if not self.write_items(folder, end, frequent):
            raise ValueError(
                f"vocabulary: min_count of '{name}' is {min_count}, and no item of `items` occurs "
                "as often up to the last training row; lower it"
            )

    def write_items(self, folder: Path, end: int, condition: str = "") -> int:
        """Write each item's content at the time `end`, or its first; return the number of items."""
        table, name = self.config.items, self.config.output.item
        assert table is not None
        columns = {name: "id"} | {column: quoted(f"t_{column}") for column in table.content}
        rows = self.engine.write(
            f"SELECT {aligned(columns, columns)} FROM item_snapshots s WHERE "
            f"(valid_from <= {end} AND valid_until > {end} OR valid_from > {end} AND "
            f"valid_from = first_valid_from){condition} ORDER BY s.id",
            folder / "items",
            ITEMS_PER_GROUP,
        )
        add_pictures(folder / "items", table, name)
        return rows

    @property
    def id_lists(self) -> dict[str, str]:
        """Lists of ids beside histories -> the column of events that each list holds."""
        return {
            name: parallel.column
            for name, parallel in self.config.parallels.items()
            if not pa.types.is_floating(self.lists[name].value_type)
        }

    def write_vocabularies(
        self,
        ids_of_tables: dict[str, str],
        folder: Path,
        earlier: Path | None = None,
        old_sizes: dict[str, int] | None = None,
    ) -> dict[str, int]:
        """Write the vocabulary of each id table unless ids are rows; return the rows of each table.

        `ids_of_tables` is a result of `ids`. Vocabularies of the dataset `earlier` are extended.
        Tables keep their sizes of `old_sizes` as long as their ids fit.
        """
        sizes: dict[str, int] = {}
        for name, ids in ids_of_tables.items():
            vocabulary = None
            if self.config.vocabulary.kind == "rows":
                min_rows = _num_rows(self.engine, name, ids)
            else:
                vocabulary = self._vocabulary(name, ids, earlier)
                min_rows = len(vocabulary) + 1
            size = (old_sizes or {}).get(name, 0)
            if min_rows > size:
                headroom = int((min_rows - 1) * self.config.vocabulary.headroom)
                min_size = 2 if self.config.vocabulary.kind == "exact" else 1
                grown = max(min_size, min_rows + headroom)
                if size:
                    logger.info("%s: its table grows from %s to %s rows", name, size, grown)
                size = grown
            lists = [list_name for list_name, column in self.id_lists.items() if column == name]
            for table in (name, *lists):
                sizes[table] = size
                if vocabulary is not None:
                    file = vocabulary_file(Location.of(folder), table).path
                    Path(file).parent.mkdir(exist_ok=True)
                    vocabulary.save(file)
        return sizes

    def _vocabulary(self, name: str, ids: str, earlier: Path | None) -> ExactVocabulary:
        min_count = self.config.vocabulary.min_count.get(name, 1)
        query = _frequent(ids, min_count)
        if name == self.config.output.item and self.config.items is not None and min_count == 1:
            query = f"{query} UNION SELECT id FROM item_snapshots"
        new = self.engine.table(f"SELECT id FROM ({query}) ORDER BY id")["id"]
        vocabulary = ExactVocabulary(len(new) + 2)
        if earlier is not None and (file := vocabulary_file(Location.of(earlier), name)).exists():
            rows = pq.read_metadata(file.path).num_rows + len(new) + 2
            vocabulary = ExactVocabulary.load(file.path, rows)
        with errors_at(f"column '{name}'"):  # ids of this call may have another type than earlier
            vocabulary.extend([new])
        return vocabulary

    def _ids(self, train: str) -> dict[str, str]:
        train = "1 = 1" if self.config.vocabulary.kind == "rows" else train
        is_known = f"{self.config.arrival} <= (SELECT max(ts) FROM complete WHERE {train})"
        return self.ids(train, f"clean_events WHERE {is_known}", f"past_events WHERE {is_known}")

    def ids(self, train: str, events: str, past_events: str) -> dict[str, str]:
        """Return SQL of the ids of each table, in the stages of events and training rows."""
        config, output = self.config, self.config.output
        ids = {
            output.user: f"SELECT uid AS id FROM {events}",
            output.item: f"SELECT iid AS id FROM {events}",
        }
        if config.vocabulary.kind == "rows":
            if config.items is not None:
                ids[output.item] += " UNION ALL SELECT id FROM item_snapshots"
            ids[output.item] += " UNION ALL SELECT iid AS id FROM complete"
        for name, feature in config.features.items():
            column = quoted(f"c_{name}")
            if feature.kind == "ids":
                column = f"{self.engine.unnest}({column})"
            if feature.kind != "dense":
                ids[name] = f"SELECT {column} AS id FROM complete WHERE {train}"
        for name, column in self.id_lists.items():
            if column == "action":
                ids[name] = f"SELECT action AS id FROM {events}"
        for column in {*self.id_lists.values()} - {"action"}:
            ids[column] += f" UNION ALL SELECT {quoted(f'e_{column}')} AS id FROM {past_events}"
        return ids

    def schema(self, sizes: dict[str, int]) -> str:
        """Return the text of `schema.yaml`, with the rows of each id table in `sizes`."""
        config, output = self.config, self.config.output
        columns = {name: self._id("id", sizes[name]) for name in (output.user, output.item)}
        for name, history in config.histories.items():
            columns[name] = {
                "kind": "sequence",
                "shares": output.item,
                "parallel": list(history.parallel),
                "fill": {
                    list_name: parallel.stored_fill
                    for list_name, parallel in history.parallel.items()
                    if list_name not in self.id_lists and parallel.column != AGE
                },
            }
        for name in self.id_lists:
            columns[name] = self._id("ids", sizes[name])
        for name, feature in config.features.items():
            is_id = feature.kind != "dense"
            columns[name] = self._id(feature.kind, sizes[name]) if is_id else {"kind": "dense"}
            columns[name]["fill"] = feature.fill
        columns |= {name: {"kind": "dense", "fill": 0.0} for name in config.counts}
        columns |= {name: {"kind": "label"} for name in config.labels}
        columns |= {name: {"kind": "extra"} for name in config.late}
        if config.weight is not None:
            columns[output.weight] = {"kind": "weight"}
        if config.negatives is not None:
            columns[output.sampled] = {"kind": "sampled"}
        for name, column in config.transforms.items():
            settings = asdict(column)
            if column.fill is None and name in column.sources(name):
                settings["fill"] = columns.get(name, {}).get("fill")  # from the replaced feature
            columns[name] = settings
        schema: dict[str, Any] = {"target_item": output.item, "group": output.user}
        schema["columns"] = {name: _without_empty(column) for name, column in columns.items()}
        if tables := [_without_empty(asdict(feature.table)) for feature in id_features(config)]:
            schema["features"] = tables
        if config.items is not None:
            content = {name: {"kind": item.kind} for name, item in config.items.content.items()}
            schema["items"] = {"id": output.item, "columns": content}
        return yaml.safe_dump(schema, sort_keys=False, default_flow_style=None)

    def _id(self, kind: str, size: int) -> dict[str, Any]:
        column: dict[str, Any] = {"kind": kind, "num_embeddings": size}
        if self.config.vocabulary.kind == "exact":
            column["vocabulary"] = {"kind": "exact"}
        return column

    def _statistics(self, conditions: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Return rows, positive share, users, and shares of new users and cold items, by split."""
        train, label = conditions["train"], quoted(f"l_{next(iter(self.config.labels))}")
        users, items = (
            f"SELECT {key}, count(*) AS n FROM complete WHERE {train}{rows} GROUP BY {key}"
            for key, rows in (("uid", self.is_logged), ("iid", self.is_counted))
        )
        cases = " ".join(f"WHEN {test} THEN '{name}'" for name, test in conditions.items())

        def share(condition: str, rows: str) -> str:
            value = f"CASE WHEN {condition} THEN 1 ELSE 0 END"  # Spark rounds means of decimals
            return f"coalesce(CAST(avg(CASE WHEN 1 = 1{rows} THEN {value} END) AS DOUBLE), 0)"

        table = self.engine.table(
            f"SELECT split, count(*) AS rows, avg({label}) AS positive, "
            f"count(DISTINCT s.uid) AS users, {share('u.n IS NULL', self.is_logged)} AS new_users, "
            f"{share(f'coalesce(i.n, 0) < {COLD_BELOW}', self.is_counted)} AS cold, "
            f"{share('i.n IS NULL', self.is_counted)} AS unseen "
            f"FROM (SELECT *, CASE {cases} END AS split FROM complete) s "
            f"LEFT JOIN ({users}) u ON s.uid = u.uid LEFT JOIN ({items}) i ON s.iid = i.iid "
            "WHERE split IS NOT NULL GROUP BY split"
        )
        statistics = {row.pop("split"): row for row in table.to_pylist()}
        return {split: statistics[split] for split in SPLITS}


def _without_empty(column: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in column.items() if value not in (None, [], {})}


def _no_rows(config: EventsConfig, split: str) -> str:
    time = f"'{config.output.time}'"
    fix = {
        "user": f"give users with 7 rows or more at distinct {time}, or split by time",
        "leave_last": "give users with at least three rows, or set a smaller `last`",
        "windows": f"give rows at more distinct {time}, or fewer windows",
        "time": f"give rows at more distinct {time}, or choose other quantiles",
        "dates": f"choose dates between the first and the last {time}",
    }[config.split.by]
    at = "" if config.split.by in ("windows", "leave_last") else f" at {config.split.at}"
    if config.embargo and config.label_window:
        fix += ", shorten `within`, or set embargo: false"
    return f"split: {split} has no rows by {config.split.by}{at}; {fix}"


def _frequent(ids: str, min_count: int) -> str:
    rows = f"SELECT id FROM ({ids}) WHERE id IS NOT NULL"
    return f"{rows} GROUP BY id HAVING count(*) >= {min_count}"


def _num_rows(engine: SqlEngine, name: str, ids: str) -> int:
    """Return the size of a table whose ids are its rows; unusable ids are a ValueError."""
    aggregates = "min(id), max(id), count(*) - count(id), count(DISTINCT id)"
    table = engine.table(f"SELECT {aggregates} FROM ({ids})")
    smallest, largest, nulls, num_ids = (column[0].as_py() for column in table.columns)
    problem = None
    if isinstance(largest, str) or (smallest is not None and smallest < 0):
        problem = f"has the id {smallest!r}; write rows from 0"
    elif nulls:
        problem = f"has null in lists or beside events, {nulls} times, which is no row; fill it"
    elif num_ids and largest >= max(LARGE_TABLE, ROWS_PER_ID * num_ids):
        problem = (
            f"has {num_ids:,} ids, of which the largest is {largest}: its table has at most "
            f"{ROWS_PER_ID:,} rows for each id, or {LARGE_TABLE:,}; number the ids"
        )
    if problem is not None:
        raise ValueError(f"vocabulary: kind is rows, but '{name}' {problem}, or choose kind exact")
    return 1 if largest is None else largest + 1
