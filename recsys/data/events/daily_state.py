"""Folder of a dataset that grows by days, and the state that `prepare events --until` keeps in it.

OUT/.state/progress.json       progress of the calls; other files that it does not name are invalid
OUT/.state/TABLE/CALL.parquet  tables of the state, a file for each call until many are merged
OUT/.ready                     the files of a committed call, before they are moved to their places

A call is committed when `.ready` appears. Files of a call that is killed earlier are ignored. If a
call is killed later, the next call moves its files.
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
    atomic_folder,
    atomic_write,
    read_json,
    recover_folder,
    replace_folder,
)
from recsys.storage.lock import JobLock

FORMAT = 1
STATE, READY, LOCK, PROGRESS = ".state", ".ready", ".lock", "progress.json"
SUCCESS = "_SUCCESS"
MAX_APPENDED = 1.0  # share of new events, relative to older ones, at which unneeded are counted
MIN_DROPPED = 0.25  # share of unneeded events at which these are dropped
MAX_CALLS = 24  # calls whose files of a table, or of its day, are not merged: one per hour


@dataclass(frozen=True)
class Progress:
    """State of a dataset after the calls so far."""

    settings: dict[str, Any]
    day: str = ""  # last prepared day
    until: int | None = None  # end of `day`, in microseconds
    calls: int = 0
    # Bytes of the files that have been read, by table and name.
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # files of some tables of the state
    compacted: int = 0  # events stored when unneeded ones were last counted
    appended: int = 0  # events stored since then
    popularity: int = 0  # number of events to draw negatives from
    sizes: dict[str, int] = field(default_factory=dict)  # rows of each table of ids


@dataclass(frozen=True)
class DailyFolder:
    """The folder OUT of a dataset that grows by days."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / STATE

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder and finish or undo a killed call; a folder in use is a ValueError."""
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
        """Return the progress; remove files of killed calls; raise if settings have changed."""
        settings, file = _settings(config), self.state / PROGRESS
        if not file.exists():
            shutil.rmtree(self.state, ignore_errors=True)
            return Progress(settings)
        stored = read_json(file)
        if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
            raise ValueError(f"{file}: no state of this version; prepare into another --out")
        progress = Progress(**stored)
        for name in sorted(settings.keys() | progress.settings.keys()):
            stored_value, value = progress.settings.get(name), settings.get(name)
            if _in_order(value) != _in_order(stored_value):
                order = " in another order" if value == stored_value else ""
                raise ValueError(
                    f"{self.path}: `{name}` was {json.dumps(stored_value)} in the calls before, "
                    f"and is {json.dumps(value)}{order}; set it back, or prepare into another --out"
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
        """Return the files of a table to merge; empty unless many calls wrote files."""
        calls: dict[str, list[Path]] = {}
        for file in self.files(table):
            calls.setdefault(file.name[:6], []).append(file)
        if len(calls) < MAX_CALLS:
            return []
        rows = [sum(pq.read_metadata(file).num_rows for file in files) for files in calls.values()]
        # A first call with half of the rows is left out, so that rows are rarely written again.
        merged = list(calls.values())[1 if 2 * rows[0] >= sum(rows) else 0 :]
        return [file for files in merged for file in files]

    def append(
        self, engine: SqlEngine, progress: Progress, table: str, query: str, order: str
    ) -> list[Path]:
        """Append rows to a table of the state, and return its files; many files are merged."""
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
        """Yield a folder whose files are all moved to OUT at the end, or none of them."""
        with atomic_folder(self.path / READY) as partial:
            yield partial
        self._publish()

    def write_progress(self, folder: Path, progress: Progress) -> None:
        content = {"format": FORMAT, **asdict(progress)}
        atomic_write(folder / STATE / PROGRESS, json.dumps(content, indent=1) + "\n")

    def _publish(self) -> None:
        """Move the files of a committed call: partitions after what they need, the state last."""
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
        for old in self.path.glob(".*.old"):  # from a call killed while it replaced a folder
            shutil.rmtree(old)
        shutil.rmtree(ready)


def names_of(**tables: list[Path]) -> dict[str, list[str]]:
    """Return the file names of each table."""
    return {table: [file.name for file in files] for table, files in tables.items()}


def _settings(config: EventsConfig) -> dict[str, Any]:
    """Return the settings that all calls must share: those that change the content of rows."""
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
    """Return settings with mappings as lists, as the order of names counts, such as of labels."""
    if isinstance(settings, dict):
        return [(name, _in_order(value)) for name, value in settings.items()]
    return settings


@dataclass(frozen=True)
class KeptEvents:
    """Tables `kept`, `earlier` and `pending` of the state, for a call that ends at `end`."""

    engine: SqlEngine
    config: EventsConfig
    folder: DailyFolder
    previous: Progress
    end: int

    def read_earlier(self, types: Types) -> None:
        """Make the stage `earlier`: numbers of dropped events, by the keys of counts."""
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
        """Write events that later calls need; return files, `compacted` and `appended`."""
        engine, folder, prior = self.engine, self.folder, self.previous
        file = folder.new_file("pending", prior)
        later = f"SELECT * FROM incoming WHERE arrived >= {self.end}"
        tables = names_of(pending=engine.save(later, file))
        file = folder.new_file("kept", prior)
        compacted, appended = prior.compacted, prior.appended + engine.count_rows("new_events")
        flagged = self._flagged_events()
        if appended > compacted * MAX_APPENDED:
            compacted, appended = compacted + appended, 0
            num_events = engine.count_rows(f"({flagged}) WHERE is_kept")
            if num_events <= compacted * (1 - MIN_DROPPED):
                return tables | self._compact(flagged, file), num_events, 0
        files = folder.append(engine, prior, "kept", "SELECT * FROM new_events", "ts")
        tables |= names_of(earlier=folder.files("earlier"), kept=files)
        return tables, compacted, appended

    def _compact(self, flagged: str, file: Path) -> dict[str, list[str]]:
        """Write needed events into one file, and numbers of the others; return the files."""
        engine, numbers = self.engine, self.folder.new_file("earlier", self.previous)
        if any(duration(count.within) is None for count in self.config.counts.values()):
            engine.add("dropped", f"SELECT position FROM ({flagged}) WHERE NOT is_kept")
        names = listed(engine.schema("clean_events").names)
        kept = engine.save(f"SELECT {names} FROM ({flagged}) WHERE is_kept ORDER BY ts", file)
        is_dropped = "position IN (SELECT position FROM dropped)"
        query = number_earlier(engine, self.config, is_dropped)
        return names_of(kept=kept, earlier=engine.save(query, numbers))

    def _flagged_events(self) -> str:
        """Return SQL of events with `is_kept`: whether rows of later calls may need them.

        All later rows know events that had arrived by `settled`. Of these, histories need only each
        user's last events, from `since_...` on.
        """
        config = self.config
        histories, counts = config.histories.values(), config.counts.values()
        delays = [history.delay for history in histories] + [count.delay for count in counts]
        late = duration(config.drop.late_rows) or 0
        delay = max((duration(text) or 0 for text in delays), default=0)
        settled = self.end - max(config.ripe_after, late) - delay - 1
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
        first_times = []
        for number, (test, length) in enumerate(lengths.items()):
            first = self.engine.first_of_last(length, f"arrived <= {settled} AND ({test})")
            first_times.append(f"{first} AS since_{number}")
            conditions.append(f"({test}) AND ts >= coalesce(since_{number}, {FOREVER})")
        is_kept = " OR ".join(f"({condition})" for condition in conditions)
        if not first_times:
            return f"SELECT *, {is_kept} AS is_kept FROM clean_events"
        return (
            f"SELECT e.*, {is_kept} AS is_kept FROM clean_events e JOIN "
            f"(SELECT uid, {', '.join(first_times)} FROM clean_events GROUP BY uid) USING (uid)"
        )
