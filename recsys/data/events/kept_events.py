"""Events that `prepare events --until` keeps for rows of later days, and numbers of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.daily_state import DailyFolder, Progress, names_of
from recsys.data.events.histories import EVENT_KEYS, NUMBER, event_key, number_earlier
from recsys.data.events.samples import actions_in
from recsys.data.events.settings import EventsConfig
from recsys.data.events.sql import FOREVER, SqlEngine, count_rows, quoted
from recsys.data.events.times import duration

MOST_APPENDED = 1.0  # new events, as a share of the earlier, at which unneeded ones are counted
LEAST_DROPPED = 0.25  # share of unneeded events at which they are dropped


@dataclass(frozen=True)
class KeptEvents:
    """Tables `kept`, `earlier` and `pending` of the state, for a call that ends with `until`."""

    engine: SqlEngine
    config: EventsConfig
    folder: DailyFolder
    before: Progress
    until: int

    def read_earlier(self, types: dict[str, pa.DataType]) -> None:
        """Make the stage `earlier`: numbers of events that are not kept, by keys of counts."""
        if files := self.folder.files("earlier"):
            self.engine.read_saved("earlier", files)
            return
        keys = {event_key(name) for count in self.config.counts.values() for name in count.of}
        columns = {"action": pa.string(), "uid": types["uid"], "iid": types["iid"]}
        snapshots = self.engine.table("SELECT * FROM samples LIMIT 0").schema
        for key in sorted(keys - columns.keys()):
            columns[key] = snapshots.field(f"c_{key.removeprefix('e_')}").type
        columns |= {EVENT_KEYS: pa.string(), NUMBER: pa.int64()}
        self.folder.state.mkdir(exist_ok=True)
        file = self.engine.work / "no_earlier.parquet"
        pq.write_table(pa.schema(columns).empty_table(), file)
        self.engine.read_saved("earlier", [file])

    def write(self) -> tuple[dict[str, list[str]], int, int]:
        """Write the events that later calls need; return the files, and events in them.

        When as many events have come as were stored before, the unneeded ones are counted, and
        dropped if they are many.
        """
        engine, folder, before = self.engine, self.folder, self.before
        file = folder.new_file("pending", before)
        tables = names_of(
            pending=engine.save(f"SELECT * FROM incoming WHERE arrived >= {self.until}", file)
        )
        file = folder.new_file("kept", before)
        compacted, appended = before.compacted, before.appended + count_rows(engine, "new_events")
        marked = self._marked()
        if appended > compacted * MOST_APPENDED:
            compacted, appended = compacted + appended, 0
            num_events = count_rows(engine, f"({marked}) WHERE is_kept")
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
        schema = engine.table("SELECT * FROM clean_events LIMIT 0").schema
        names = ", ".join(map(quoted, schema.names))
        kept = engine.save(f"SELECT {names} FROM ({marked}) WHERE is_kept ORDER BY ts", file)
        is_dropped = "position IN (SELECT position FROM dropped)"
        query = number_earlier(engine, self.config, is_dropped, "earlier")
        return names_of(kept=kept, earlier=engine.save(query, numbers))

    def _marked(self) -> str:
        """Return SQL of events with `is_kept`: whether rows of later calls may need them.

        All later rows know an event that had arrived by `settled`, so that only a user's last ones
        matter for histories: those since the time of the first of them, `since_...`.
        """
        config = self.config
        histories, counts = config.histories.values(), config.counts.values()
        delays = [history.delay for history in histories] + [count.delay for count in counts]
        late = duration(config.drop.late_rows) or 0
        settled = (
            self.until
            - max(config.ripe_after, late)
            - max((duration(delay) or 0 for delay in delays), default=0)
            - 1
        )
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
        since = [
            self.engine.least_of_last("ts", length, f"arrived <= {settled} AND ({test})")
            + f" AS since_{place}"
            for place, (test, length) in enumerate(lengths.items())
        ]
        conditions += [
            f"({test}) AND ts >= coalesce(since_{place}, {FOREVER})"
            for place, test in enumerate(lengths)
        ]
        is_kept = " OR ".join(f"({part})" for part in conditions)
        if not since:
            return f"SELECT *, {is_kept} AS is_kept FROM clean_events"
        return (
            f"SELECT e.*, {is_kept} AS is_kept FROM clean_events e JOIN "
            f"(SELECT uid, {', '.join(since)} FROM clean_events GROUP BY uid) USING (uid)"
        )
