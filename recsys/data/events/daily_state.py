"""Folder of a dataset that grows by days, and the state that `prepare events --until` keeps in it.

OUT/.state/progress.json       what is done; the files that it does not name do not count
OUT/.state/TABLE/CALL.parquet  tables of the state, a file for each call until many are merged
OUT/.ready                     the files of a call that is done; they are moved to their places

A call ends when `.ready` appears. A call that is killed before leaves nothing that counts, and one
that is killed later is ended by the next.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from recsys.data.events.settings import EventsConfig
from recsys.data.events.sql import SqlEngine
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
REPORT, SUCCESS = "report.json", "_SUCCESS"
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
        """Hold the folder alone, with what killed calls left in it put in order.

        A folder that another call holds, or that holds something else, is a ValueError.
        """
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
        settings = _settings(config)
        file = self.state / PROGRESS
        if not file.exists():
            shutil.rmtree(self.state, ignore_errors=True)
            return Progress(settings)
        stored = read_json(file)
        if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
            raise ValueError(f"{file}: no state of this version; prepare into another --out")
        progress = Progress(**stored)
        before = progress.settings
        for name in sorted(settings.keys() | before.keys()):
            if settings.get(name) != before.get(name):
                raise ValueError(
                    f"{self.path}: `{name}` was {json.dumps(before.get(name))} in the calls "
                    f"before, and is {json.dumps(settings.get(name))}; set it back, or prepare "
                    "into another --out"
                )
        for path in self.state.rglob("*.parquet"):
            if int(path.name[:6]) >= progress.calls or self._is_old(path, progress):
                path.unlink()
        return progress

    def _is_old(self, path: Path, progress: Progress) -> bool:
        tables, table = progress.tables, path.parent.name
        return table in tables and path.name not in tables[table]

    def files(self, table: str) -> list[Path]:
        """Return the files of a table of the state."""
        return sorted((self.state / table).rglob("*.parquet"))

    def crowded(self, table: str) -> list[Path]:
        """Return the files of a table to merge, if these are of many calls.

        A first one with half of the rows is left as it is, so that rows are seldom written again.
        """
        calls: dict[str, list[Path]] = {}
        for file in self.files(table):
            calls.setdefault(file.name[:6], []).append(file)
        if len(calls) < MOST_CALLS:
            return []
        rows = [sum(pq.read_metadata(file).num_rows for file in files) for files in calls.values()]
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
        new = engine.save(
            f"SELECT * FROM ({query}) ORDER BY {order}", self.new_file(table, progress)
        )
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
            if not path.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                replace_folder(path, target)
            else:
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
