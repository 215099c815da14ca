"""Folder of a dataset that grows by days, and the state that `prepare events --until` keeps in it.

OUT/.state/progress.json       what is done; the files that it does not name do not count
OUT/.state/TABLE/CALL.parquet  tables of the state, a file for each call until many are merged
OUT/.ready                     the files of a call that is done; they are moved to their places

A call ends when `.ready` appears. A call that is killed before leaves nothing that counts, and one
that is killed later is ended by the next.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.file_columns import Types
from recsys.data.events.histories import EVENT_KEYS, NUMBER, event_key, number_earlier
from recsys.data.events.samples import actions_in
from recsys.data.events.settings import EventsConfig
from recsys.data.events.sql import FOREVER, SqlEngine, listed
from recsys.data.events.times import duration
from recsys.storage.files import (
    read_json,
    recover_folder,
    replace_folder,
    whole_folder,
    write_whole,
)
from recsys.storage.lock import JobLock

FORMAT = 1
STATE, READY, LOCK, PROGRESS = ".state", ".ready", ".lock", "progress.json"
SUCCESS = "_SUCCESS"
MOST_APPENDED = 1.0  # new events, as a share of the earlier, at which unneeded ones are counted
LEAST_DROPPED = 0.25  # share of unneeded events at which they are dropped
MOST_CALLS = 24  # that may have files of a table, or of a day of one: an hour each of a day


@dataclass(frozen=True)
class Progress:
    """State of a dataset after the calls so far."""

    settings: dict[str, Any]
    day: str = ""  # the last one that is prepared
    until: int | None = None  # its end, in microseconds
    calls: int = 0
    # Bytes of the files that are read, by table and name.
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # files of some tables of the state
    compacted: int = 0  # events stored when unneeded ones were last counted
    appended: int = 0  # events stored since then
    popularity: int = 0  # events to draw from
    sizes: dict[str, int] = field(default_factory=dict)  # rows of each table of ids


@dataclass(frozen=True)
class DailyFolder:
    """Folder OUT of a dataset."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / STATE

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder alone, and put it in order; one in use by others is a ValueError."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: no folder; name another --out")
        names = {entry.name for entry in self.path.glob("*")}
        other_names = {name for name in names if not name.startswith((LOCK, f".{READY}."))}
        if other_names and not other_names & {STATE, READY}:
            raise ValueError(
                f"{self.path}: exists already, without the state of `--until`; remove it or name "
                "another --out"
            )
        lock = JobLock(self.path, self.path / LOCK)
        lock.acquire("")
        try:
            self._publish()
            for partial in self.path.glob(f".{READY}.*.partial"):
                shutil.rmtree(partial)
            yield
        finally:
            lock.release()

    def progress(self, config: EventsConfig) -> Progress:
        """Return what is done; remove files of killed calls; other settings are a ValueError."""
        settings, file = _settings(config), self.state / PROGRESS
        if not file.exists():
            shutil.rmtree(self.state, ignore_errors=True)
            return Progress(settings)
        stored = read_json(file)
        if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
            raise ValueError(f"{file}: no state of this version; prepare into another --out")
        progress = Progress(**stored)
        for name in sorted(settings.keys() | progress.settings.keys()):
            before, after = progress.settings.get(name), settings.get(name)
            if _in_order(after) != _in_order(before):
                order = " in another order" if after == before else ""
                raise ValueError(
                    f"{self.path}: `{name}` was {json.dumps(before)} in the calls before, and is "
                    f"{json.dumps(after)}{order}; set it back, or prepare into another --out"
                )
        for path in self.state.rglob("*.parquet"):
            is_current = path.name in progress.tables.get(path.parent.name, [path.name])
            if int(path.name[:6]) >= progress.calls or not is_current:
                path.unlink()
        return progress

    def files(self, table: str) -> list[Path]:
        """Return the files of a table of the state."""
        return sorted((self.state / table).rglob("*.parquet"))

    def crowded(self, table: str) -> list[Path]:
        """Return the files of a table to merge, if these are of many calls."""
        calls: dict[str, list[Path]] = {}
        for file in self.files(table):
            calls.setdefault(file.name[:6], []).append(file)
        if len(calls) < MOST_CALLS:
            return []
        rows = [sum(pq.read_metadata(file).num_rows for file in files) for files in calls.values()]
        # A first one with half of them is left out, so that rows are seldom written again.
        parts = list(calls.values())[1 if 2 * rows[0] >= sum(rows) else 0 :]
        return [file for files in parts for file in files]

    def append(
        self, engine: SqlEngine, progress: Progress, table: str, query: str, order: str
    ) -> list[Path]:
        """Write rows to a table of the state, and return its files; many are merged."""
        files, merged = self.files(table), self.crowded(table)
        if merged:
            engine.read_saved(f"merged_{table}", merged)
            query = f"SELECT * FROM merged_{table} UNION ALL SELECT * FROM ({query})"
        file = self.new_file(table, progress)
        new = engine.save(f"SELECT * FROM ({query}) ORDER BY {order}", file)
        return [*(file for file in files if file not in merged), *new]

    def new_file(self, table: str, progress: Progress) -> Path:
        """Return the file of the call after `progress` for a table of the state."""
        return self.state / table / f"{progress.calls:06}.parquet"

    @contextmanager
    def commit(self) -> Iterator[Path]:
        """Yield a folder whose files come to their places in OUT, all or none."""
        with whole_folder(self.path / READY) as partial:
            yield partial
        self._publish()

    def write_progress(self, folder: Path, progress: Progress) -> None:
        content = {"format": FORMAT, **asdict(progress)}
        write_whole(folder / STATE / PROGRESS, json.dumps(content, indent=1) + "\n")

    def _publish(self) -> None:
        """Move the files of a call that is done: partitions behind what they need, state last."""
        ready = self.path / READY
        if not ready.is_dir():
            return
        entries = [path for path in sorted(ready.iterdir()) if path.name not in (STATE, "train")]
        partitions = sorted(file.parent for file in (ready / "train").rglob(SUCCESS))
        for path in [*entries, *partitions, ready / STATE / PROGRESS]:
            target = self.path / path.relative_to(ready)
            recover_folder(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                replace_folder(path, target)
            elif path.exists():
                path.replace(target)
        for old in self.path.glob(".*.old"):  # of a call that was killed as it replaced a folder
            shutil.rmtree(old)
        shutil.rmtree(ready)


def names_of(**tables: list[Path]) -> dict[str, list[str]]:
    """Return the names of the files of tables."""
    return {table: [file.name for file in files] for table, files in tables.items()}


def _settings(config: EventsConfig) -> dict[str, Any]:
    """Return the settings that calls share: all but places of files, and what draws no row."""
    settings = json.loads(json.dumps(asdict(config)))
    for name in ("split", "embargo"):
        del settings[name]
    del settings["vocabulary"]["headroom"]
    tables = [*settings["events"].values(), settings["impressions"]]
    for table in (*tables, settings["items"], settings["users"]):
        if table is not None:
            del table["path"]
    return settings


def _in_order(settings: Any) -> Any:
    """Return settings so that a comparison sees the order of names, as that of labels counts."""
    if isinstance(settings, dict):
        return [(name, _in_order(part)) for name, part in settings.items()]
    return settings


@dataclass(frozen=True)
class KeptEvents:
    """Tables `kept`, `earlier` and `pending` of the state, for a call that ends with `until`."""

    engine: SqlEngine
    config: EventsConfig
    folder: DailyFolder
    before: Progress
    until: int

    def read_earlier(self, types: Types) -> None:
        """Make the stage `earlier`: numbers of events that are not kept, by keys of counts."""
        if files := self.folder.files("earlier"):
            self.engine.read_saved("earlier", files)
            return
        keys = {event_key(name) for count in self.config.counts.values() for name in count.of}
        columns = {"action": pa.string(), "uid": types["uid"], "iid": types["iid"]}
        for key in sorted(keys - columns.keys()):
            snapshots = self.engine.schema("item_snapshots")
            columns[key] = snapshots.field(f"f_{key.removeprefix('e_')}").type
        columns |= {EVENT_KEYS: pa.string(), NUMBER: pa.int64()}
        file = self.engine.work / "no_earlier.parquet"
        pq.write_table(pa.schema(columns).empty_table(), file)
        self.engine.read_saved("earlier", [file])

    def write(self) -> tuple[dict[str, list[str]], int, int]:
        """Write the events that later calls need; return the files, and events in them."""
        engine, folder, before = self.engine, self.folder, self.before
        file = folder.new_file("pending", before)
        later = f"SELECT * FROM incoming WHERE arrived >= {self.until}"
        tables = names_of(pending=engine.save(later, file))
        file = folder.new_file("kept", before)
        compacted, appended = before.compacted, before.appended + engine.count_rows("new_events")
        marked = self._marked()
        if appended > compacted * MOST_APPENDED:
            compacted, appended = compacted + appended, 0
            num_events = engine.count_rows(f"({marked}) WHERE is_kept")
            if num_events <= compacted * (1 - LEAST_DROPPED):
                return tables | self._compact(marked, file), num_events, 0
        files = folder.append(engine, before, "kept", "SELECT * FROM new_events", "ts")
        tables |= names_of(earlier=folder.files("earlier"), kept=files)
        return tables, compacted, appended

    def _compact(self, marked: str, file: Path) -> dict[str, list[str]]:
        """Write the events that are needed into one file, and numbers of all that are not."""
        engine, numbers = self.engine, self.folder.new_file("earlier", self.before)
        if any(duration(count.within) is None for count in self.config.counts.values()):
            engine.add("dropped", f"SELECT position FROM ({marked}) WHERE NOT is_kept")
        names = listed(engine.schema("clean_events").names)
        kept = engine.save(f"SELECT {names} FROM ({marked}) WHERE is_kept ORDER BY ts", file)
        is_dropped = "position IN (SELECT position FROM dropped)"
        query = number_earlier(engine, self.config, is_dropped)
        return names_of(kept=kept, earlier=engine.save(query, numbers))

    def _marked(self) -> str:
        """Return SQL of events with `is_kept`: whether rows of later calls may need them.

        All later rows know an event that had arrived by `settled`, so that of these histories need
        a user's last ones alone: those since `since_...`.
        """
        config = self.config
        histories, counts = config.histories.values(), config.counts.values()
        delays = [history.delay for history in histories] + [count.delay for count in counts]
        late = duration(config.drop.late_rows) or 0
        delay = max((duration(text) or 0 for text in delays), default=0)
        settled = self.until - max(config.ripe_after, late) - delay - 1
        conditions = [f"arrived > {settled}"]
        for count in counts:
            if (within := duration(count.within)) is not None:
                sets = [count.actions, *([] if count.per is None else [count.per])]
                is_counted = " OR ".join(f"({actions_in(actions)})" for actions in sets)
                conditions.append(f"ts >= {settled - within} AND ({is_counted})")
        lengths: dict[str, int] = {}
        for history in histories:
            test = actions_in(history.actions)
            lengths[test] = max(history.length, lengths.get(test, 0))
        since = []
        for place, (test, length) in enumerate(lengths.items()):
            first = self.engine.least_of_last("ts", length, f"arrived <= {settled} AND ({test})")
            since.append(f"{first} AS since_{place}")
            conditions.append(f"({test}) AND ts >= coalesce(since_{place}, {FOREVER})")
        is_kept = " OR ".join(f"({part})" for part in conditions)
        if not since:
            return f"SELECT *, {is_kept} AS is_kept FROM clean_events"
        return (
            f"SELECT e.*, {is_kept} AS is_kept FROM clean_events e JOIN "
            f"(SELECT uid, {', '.join(since)} FROM clean_events GROUP BY uid) USING (uid)"
        )
