"""`recsys prepare events --until DAY`: datasets that grow by days; a call processes new data only.

An event counts from its arrival. A row is written on the day on which it has arrived and is ripe,
so its content does not depend on how many calls wrote the days. Between calls, the state keeps
events that later rows may need, and counts of other events:

kept       events of the last days and of the windows of counts, and each user's last events
earlier    numbers of other events, by the keys of counts over all time
pending    events whose arrival is after the end of the call
seen       keys of events by day, to find repeated events
catalogue, taken, popularity    items, users' items, and events to draw negatives from
"""

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.clean_events import (
    copy_key,
    event_fields,
    read_tables,
    usable_rows,
    without_copies,
)
from recsys.data.events.daily_state import SUCCESS, DailyFolder, KeptEvents, Progress, names_of
from recsys.data.events.dataset import DatasetWriter, complete_samples
from recsys.data.events.file_columns import Types
from recsys.data.events.histories import EVENT_KEYS
from recsys.data.events.last_features import write_last_features
from recsys.data.events.load import load_events_config
from recsys.data.events.negatives import ItemPool, KnownItems, item_times, numbered_items
from recsys.data.events.reader import NoRows, Reader, file_sizes, open_source
from recsys.data.events.samples import DAY, END, check_actions, is_row, make_rows
from recsys.data.events.settings import EventsConfig, Negatives
from recsys.data.events.snapshots import read_snapshots
from recsys.data.events.sql import FOREVER, SqlEngine, listed, open_engine, quoted
from recsys.data.events.times import DAY as ONE_DAY
from recsys.data.events.times import duration

logger = logging.getLogger(__name__)

TABLE_BITS = 16  # bits of a file's number in its table, the same however many calls read files
REPORT = "report.json"
RIPE = "/ripe"  # column of rows: time from which a row is ripe and has arrived
TRAIN_ALONE = {"": {"train": "1 = 1", "valid": "1 = 0", "test": "1 = 0"}}


class NoEvents(ValueError):
    """Raised if no usable event has arrived by the end of a call."""


def prepare_days(
    config: Path,
    out: Path,
    day: str,
    source: Path | None = None,
    memory: str | None = None,
    threads: int | None = None,
    temp: Path | None = None,
    spark_master: str | None = None,
    after_new_files: bool = False,
) -> dict[str, Any] | None:
    """Write all missing partitions of days (or hours) up to `day`, a day or an hour.

    Returns:
        The report of the call, also in `report.json`. If `day` is written already, the previous
        report. With `after_new_files`, None in that case, and if no file is new.

    Raises:
        NoEvents: no usable event has arrived by the end of `day`.
        ValueError: as `prepare_events`; or a setting does not apply to days, or differs from that
            of the previous calls.
    """
    settings = load_events_config(config, source)
    if (problem := _unfit(settings)) is not None:
        raise ValueError(f"{config}: {problem}")
    for table in settings.tables.values():
        table.arrived = table.arrived or table.time  # a file may come late
    end = settings.calendar.end_of(day)
    folder = DailyFolder(out.absolute())
    with folder.locked():
        progress = folder.progress(settings)
        is_done = progress.until is not None and end <= progress.until
        if after_new_files and (is_done or not _has_new_files(settings, progress)):
            return None
        if is_done:
            logger.info("%s: %s is prepared, up to %s", out, day, progress.day)
            return dict(json.loads((folder.path / REPORT).read_text()))
        with (
            folder.commit() as partial,
            open_engine(partial, temp, memory, threads, spark_master) as engine,
        ):
            return Call(engine, settings, folder, progress, day, end).run(partial)


def _has_new_files(config: EventsConfig, progress: Progress) -> bool:
    """Return whether a table has an unread file and every table has files."""
    new = set[str]()
    for name, table in config.tables.items():
        read, files = progress.files.get(name, {}), file_sizes(name, table, may_be_empty=True)
        if not read and not files:
            return False
        new |= files.keys() - read.keys()
    return bool(new)


def _unfit(config: EventsConfig) -> str | None:
    """Return an error message on a setting that `--until` does not support, or None."""
    if config.drop.max_events_per_user is not None:
        return "drop: max_events_per_user is not for --until; leave it out"
    if config.vocabulary.min_count:
        return (
            "vocabulary: min_count is not for --until, as training gives rows to new ids; remove it"
        )
    max_negatives = (1 << (26 - TABLE_BITS)) // len(config.tables)
    if config.negatives is not None and config.negatives.per_positive > max_negatives:
        return f"negatives: per_positive is over {max_negatives}, the most with --until; lower it"
    return None


@dataclass(frozen=True)
class Call:
    """One call of `prepare_days`, for the days between the end of the last call and `end`."""

    engine: SqlEngine
    config: EventsConfig
    folder: DailyFolder
    previous: Progress
    day: str
    end: int
    tables: dict[str, list[str]] = field(default_factory=dict)  # files that the call adds

    @property
    def begin(self) -> int:
        """The end of the last call: events of this call arrive from this time on."""
        return -FOREVER if self.previous.until is None else self.previous.until

    def run(self, out: Path) -> dict[str, Any]:
        """Write the partitions, other files of the dataset and the state; return the report."""
        engine, config = self.engine, self.config
        types, num_read, reasons, files = self._read_events()
        reasons |= read_snapshots(engine, config, types, must_match=self.previous.until is None)
        if self.previous.until is None:  # later days may lack actions
            check_actions(engine, config.actions, "clean_events", may_come=True)
        reasons |= self._due_rows()
        reasons |= make_rows(engine, config, is_daily=True)
        pool, popularity = self._item_pool(config.negatives) if config.negatives else (None, 0)
        events = KeptEvents(engine, config, self.folder, self.previous, self.end)
        events.read_earlier(types)
        writer, missing = complete_samples(engine, config, types, TRAIN_ALONE, pool, is_daily=True)
        sizes = self._write(writer, out)
        tables, compacted, appended = events.write()
        label = quoted(f"l_{next(iter(config.labels))}")
        table = engine.table(
            f"SELECT {quoted(DAY)} AS day, count(*) AS rows, avg({label}) AS positive "
            "FROM complete GROUP BY 1 ORDER BY 1"
        )
        days = {row.pop("day"): row for row in table.to_pylist()}
        report = {"events": num_read, "left_out": reasons | missing, "days": days}
        (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        progress = replace(
            self.previous,
            day=self.day,
            until=self.end,
            calls=self.previous.calls + 1,
            files=files,
            tables=self.previous.tables | self.tables | tables,
            compacted=compacted,
            appended=appended,
            popularity=popularity,
            sizes=sizes,
        )
        self.folder.write_progress(out, progress)
        return report

    def _read_events(self) -> tuple[Types, int, dict[str, int], dict[str, dict[str, int]]]:
        """Make `new_events` and `clean_events`; return types, rows read and left out, and files."""
        engine, config = self.engine, self.config
        readers, files = self._new_readers()
        types: Types = {}
        if kept := self.folder.files("kept"):
            engine.read_saved("kept", kept)
            types = {field.name: field.type for field in list(engine.schema("kept"))[1:]}
        if readers:
            types = read_tables(engine, config, readers, types)
        names = listed(["position", *types])
        if not readers:
            engine.view("events_read", f"SELECT {names} FROM kept WHERE 1 = 0")
        incoming, num_read, reasons = usable_rows(engine, config, types, self.begin)
        if pending := self.folder.files("pending"):
            engine.read_saved("pending", pending)
            incoming += f" UNION ALL SELECT {names} FROM pending"
        engine.add("incoming", incoming)
        engine.view("usable", f"SELECT * FROM incoming WHERE arrived < {self.end}")
        unique, num_copies = without_copies(engine, config, types)
        engine.add("unseen", unique)
        if not kept:
            engine.view("kept", "SELECT * FROM unseen WHERE 1 = 0")
        num_unseen = engine.count_rows("unseen")
        self._drop_seen(types)
        if repeated := num_copies + num_unseen - engine.count_rows("new_events"):
            reasons["duplicate"] = repeated
        if num_unseen == 0 and not kept:
            raise NoEvents(f"--until {self.day}: no event that can be used is known by then")
        engine.view("clean_events", self._events("1 = 1", "1 = 1"))
        return types, num_read, reasons, files

    def _events(self, stored_condition: str, new_condition: str) -> str:
        """Return SQL of kept events and of new events, each restricted by a condition."""
        names = listed(self.engine.schema("new_events").names)
        return (
            f"SELECT {names} FROM kept WHERE {stored_condition} "
            f"UNION ALL SELECT {names} FROM new_events WHERE {new_condition}"
        )

    def _new_readers(self) -> tuple[dict[str, Reader], dict[str, dict[str, int]]]:
        """Return readers of the tables with new files, and the bytes of all files by table."""
        readers, files = {}, {}
        for number, (name, table) in enumerate(self.config.tables.items()):
            read, urls = dict(self.previous.files.get(name, {})), []
            first = len(read)
            for file, (url, size) in file_sizes(name, table, first > 0).items():
                if file not in read:
                    urls.append(url)
                elif read[file] != size:
                    raise ValueError(
                        f"{url}: has {size:,} bytes, and had {read[file]:,} when it was read; "
                        "write new events into new files, or prepare into another --out"
                    )
                read[file] = size
            files[name] = read
            if len(read) > 1 << TABLE_BITS:
                raise ValueError(f"'{name}' has {len(read):,} files; write larger ones")
            if urls:
                file_number = (number << TABLE_BITS) + first
                fields = event_fields(self.config, name)
                try:
                    readers[name] = open_source(name, table, fields, file_number, urls)
                except NoRows:
                    if not first:
                        raise
        return readers, files

    def _drop_seen(self, types: Types) -> None:
        """Make the stage `new_events`, without events of earlier calls; write their keys."""
        engine = self.engine
        if not self.config.drop.duplicates:
            engine.view("new_events", "SELECT * FROM unseen")
            return
        number = f"CAST(floor(ts / {ONE_DAY}) AS BIGINT)"
        table = engine.table(f"SELECT DISTINCT {number} AS day FROM unseen ORDER BY 1")
        days, condition = table["day"].to_pylist(), ""
        if files := [file for day in days for file in self.folder.files(f"seen/day={day}")]:
            engine.read_saved("seen", files)
            keys = copy_key(types).split(", ")
            equal_keys = " AND ".join(f"u.{key} IS NOT DISTINCT FROM s.{key}" for key in keys)
            condition = f"WHERE NOT EXISTS (SELECT 1 FROM seen s WHERE {equal_keys})"
        engine.add("new_events", f"SELECT u.* FROM unseen u {condition}")
        self._add_seen(copy_key(types), number, days)

    def _add_seen(self, key: str, number: str, days: list[int]) -> None:
        """Write the keys of new events by day; merge the files of a day that many calls wrote."""
        engine, folder = self.engine, self.folder
        query = f"SELECT {key}, {number} AS day FROM new_events"
        merged = {day: files for day in days if (files := folder.crowded(f"seen/day={day}"))}
        for index, (day, files) in enumerate(merged.items()):  # a day before 1970 is below 0
            engine.read_saved(f"seen_{index}", files)
            query += f" UNION ALL SELECT {key}, CAST({day} AS BIGINT) AS day FROM seen_{index}"
        old_files = {f"day={day}": folder.files(f"seen/day={day}") for day in days}
        file = folder.new_file("seen", self.previous)
        new = engine.save(f"SELECT * FROM ({query}) ORDER BY day, uid", file, by="day")
        for day in days:
            name = f"day={day}"
            if day in merged or name in self.previous.tables:
                files = [file for file in old_files[name] if file not in merged.get(day, [])]
                files += [file for file in new if file.parent.name == name]
                self.tables.update(names_of(**{name: files}))

    def _due_rows(self) -> dict[str, int]:
        """Make the stages `due`, the rows to write, and `unique_events`, which may label them.

        Due rows have a day `/day` and its end `/end`. Returns the number of other rows by reason.
        """
        engine, config = self.engine, self.config
        late = f"arrived - ts > {duration(config.drop.late_rows)}"
        ripe = quoted(RIPE)
        # Kept events arrived before this call, so only their time decides whether they are ripe.
        events = self._events(f"ts >= {self.begin - config.ripe_after}", "1 = 1")
        engine.view(
            "ripe_rows",
            f"SELECT *, greatest(ts + {config.ripe_after}, arrived) AS {ripe} FROM ({events}) "
            f"WHERE {is_row(config)}",
        )
        is_due = f"{ripe} >= {self.begin} AND {ripe} < {self.end}"
        number = f"CAST(floor({ripe} / {ONE_DAY}) AS BIGINT)"
        numbers = engine.table(f"SELECT DISTINCT {number} AS day FROM ripe_rows WHERE {is_due}")
        periods = config.calendar.around(numbers["day"].to_pylist())
        values = ", ".join(map(str, periods)) or "('', 0, 0)"
        engine.add(
            "due",
            f"SELECT r.*, d.day AS {quoted(DAY)}, d.after AS {quoted(END)} FROM ripe_rows r JOIN "
            f"(VALUES {values}) AS d(day, first, after) "
            f"ON r.{ripe} >= d.first AND r.{ripe} < d.after WHERE {is_due} AND NOT ({late})",
        )
        later = f"ts > {engine.value(f'coalesce(min(ts), {FOREVER})', 'due')}"
        engine.view("unique_events", self._events(later, later))
        cases = {
            f"known more than {config.drop.late_rows} after their time": f"{is_due} AND {late}",
            "wait until their labels are decided": f"{ripe} >= {self.end} AND NOT ({late})",
        }
        reasons = engine.count_by_reason(cases, "ripe_rows")
        return {name: count for name, count in reasons.items() if name and count}

    def _item_pool(self, settings: Negatives) -> tuple[ItemPool, int]:
        """Make the stage `catalogue`; return the pool to draw from, and the number of events."""
        engine, folder, first = self.engine, self.folder, 0
        times = item_times(self.config, "new_events")
        if files := folder.files("catalogue"):
            engine.read_saved("known_catalogue", files)
            first = engine.count_rows("known_catalogue")
            times = f"SELECT * FROM ({times}) WHERE iid NOT IN (SELECT iid FROM known_catalogue)"
        begin = f"greatest(since, {self.begin}) AS since"
        times = f"SELECT iid, {begin} FROM ({times}) WHERE since < {self.end}"
        items = numbered_items(times, first)
        files = folder.append(engine, self.previous, "catalogue", items, "inumber")
        engine.read_saved("catalogue", files)
        taken = "SELECT uid, iid, min(arrived) AS since FROM new_events GROUP BY uid, iid"
        pairs = folder.append(engine, self.previous, "taken", taken, "uid, iid")
        engine.read_saved("taken", pairs)
        self.tables.update(names_of(catalogue=files, taken=pairs))
        has_rows = "uid IN (SELECT uid FROM rows)"
        taken = f"SELECT uid, iid, min(since) AS since FROM taken WHERE {has_rows} GROUP BY 1, 2"
        popularity = None
        if settings.by == "popularity":
            popularity = KnownItems(folder.state / "popularity")
            popularity.cut(self.previous.popularity)
            popularity.append_events(engine, self.config, "new_events")
        block = f"CAST(replace(replace({quoted(DAY)}, '-', ''), '/hour=', '') AS BIGINT)"
        pool = ItemPool(KnownItems.of_catalogue(engine), popularity, taken, block)
        return pool, 0 if popularity is None else len(popularity.times)

    def _write(self, writer: DatasetWriter, out: Path) -> dict[str, int]:
        """Write partitions, vocabularies, items, features and schema; return rows by id table."""
        engine, config = self.engine, self.config
        names, complete = writer.columns()
        rows = (
            f"SELECT {names}, 'date=' || c.{quoted(DAY)} AS {quoted(DAY)} FROM complete c "
            f"ORDER BY c.{quoted(DAY)}, c.ts, c.uid, c.iid, c.position"
        )
        engine.write_by(rows, DAY, out / "train", complete)
        for partition in {file.parent for file in (out / "train").rglob("*.parquet")}:
            (partition / SUCCESS).touch()
        past_events = f"past_events WHERE {quoted(EVENT_KEYS)} = ''"
        ids = writer.ids("1 = 1", "new_events", past_events)
        sizes = writer.write_vocabularies(ids, out, self.folder.path, self.previous.sizes)
        item, counts = config.output.item, writer.item_counts("1 = 1")
        if (file := self.folder.path / "item_counts.parquet").exists():
            tables = [pq.read_table(file, partitioning=None), counts]
            counts = pa.concat_tables(tables, promote_options="default").group_by(item)
            counts = counts.aggregate([("train_rows", "sum")]).rename_columns([item, "train_rows"])
        pq.write_table(counts.sort_by(item), out / "item_counts.parquet")
        if config.items is not None:
            writer.write_items(out, self.end - 1)
        write_last_features(engine, config, out / "features", self.end)
        (out / "schema.yaml").write_text(writer.schema(sizes))
        return sizes
