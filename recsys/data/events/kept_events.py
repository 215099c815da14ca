"""Events that `prepare events --until` keeps for rows of later days, and numbers of the others."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.events.daily_state import DailyFolder, Progress
from recsys.data.events.histories import KEYS_OF, NUMBER, event_key, number_earlier
from recsys.data.events.samples import actions_in
from recsys.data.events.settings import EventsConfig
from recsys.data.events.sql import DuckDBEngine, count_rows
from recsys.data.events.times import duration

MOST_APPENDED = 1.0  # events beside the first file of those kept, as a share of its events


@dataclass(frozen=True)
class KeptEvents:
    """Tables `kept`, `earlier` and `pending` of the state, for a call that ends with `until`."""

    engine: DuckDBEngine
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
        columns |= {KEYS_OF: pa.string(), NUMBER: pa.int64()}
        self.folder.state.mkdir(exist_ok=True)
        file = self.engine.work / "no_earlier.parquet"
        pq.write_table(pa.schema(columns).empty_table(), file)
        self.engine.read_saved("earlier", [file])

    def write(self) -> tuple[dict[str, list[str]], int, int]:
        """Write the events that later calls need; return the files, and events in them.

        The files are made anew when as many events have come as there were, so that an event is
        written again only as often as the state doubles.
        """
        engine, folder, before = self.engine, self.folder, self.before
        file = folder.new_file("pending", before)
        engine.save(f"SELECT * FROM incoming WHERE arrived >= {self.until}", file)
        tables = {"pending": [file.name]}
        file = folder.new_file("kept", before)
        appended = before.appended + count_rows(engine, "new_events")
        earlier = [path.name for path in folder.files("earlier")]
        if appended <= before.compacted * MOST_APPENDED:
            engine.save("SELECT * FROM new_events ORDER BY ts", file)
            kept = [*before.tables.get("kept", []), file.name]
            return {**tables, "kept": kept, "earlier": earlier}, before.compacted, appended
        engine.add("dropped", f"SELECT position FROM ({self._marked()}) WHERE NOT is_kept")
        is_dropped = "position IN (SELECT position FROM dropped)"
        engine.save(f"SELECT * FROM clean_events WHERE NOT ({is_dropped}) ORDER BY ts", file)
        numbers = folder.new_file("earlier", before)
        engine.save(number_earlier(engine, self.config, is_dropped, "earlier"), numbers)
        compacted = pq.read_metadata(file).num_rows
        return {**tables, "kept": [file.name], "earlier": [numbers.name]}, compacted, 0

    def _marked(self) -> str:
        """Return SQL of events with `is_kept`: whether rows of later calls may need them.

        All later rows know an event that had arrived by `settled`, so that only a user's last ones
        matter for histories.
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
        needed = [f"arrived > {settled}"]
        for count in counts:
            if (within := duration(count.within)) is not None:
                sets = [count.actions, *([] if count.per is None else [count.per])]
                is_counted = " OR ".join(f"({actions_in(actions)})" for actions in sets)
                needed.append(f"ts >= {settled - within} AND ({is_counted})")
        lengths: dict[str, int] = {}
        for history in histories:
            test = actions_in(history.actions)
            lengths[test] = max(history.length, lengths.get(test, 0))
        ranks = []
        for number, (test, length) in enumerate(lengths.items()):
            is_old = f"arrived <= {settled} AND {test}"
            ranks.append(
                f"row_number() OVER (PARTITION BY uid, {is_old} ORDER BY ts DESC, iid DESC, "
                f"position DESC) AS rank_{number}"
            )
            needed.append(f"{test} AND rank_{number} <= {length}")
        columns = ", ".join(["position, ts, arrived, action", *ranks])
        is_kept = " OR ".join(f"({part})" for part in needed)
        return f"SELECT position, {is_kept} AS is_kept FROM (SELECT {columns} FROM clean_events)"
