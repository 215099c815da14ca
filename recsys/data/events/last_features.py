"""Write the last known features of items, users and other ids, for scoring requests.

Columns of snapshots have the values that are valid when the dataset is made. Counts are those of a
sample right after the last event.
"""

from dataclasses import dataclass
from pathlib import Path

from recsys.data.events.histories import event_key, make_counts
from recsys.data.events.settings import Count, EventsConfig, Feature
from recsys.data.events.snapshots import snapshot_tables
from recsys.data.events.sql import SqlEngine, aligned, filled, listed, quoted
from recsys.data.schema_columns import FeatureTable


@dataclass(frozen=True)
class IdFeatures:
    """Columns of snapshots, and counts, of the ids in `keys`, which are named as in `Count.of`."""

    config: EventsConfig
    keys: tuple[str, ...]
    columns: dict[str, Feature]
    counts: dict[str, Count]

    @property
    def by(self) -> list[str]:
        """Columns of the dataset with the ids."""
        output = self.config.output
        return [{"item": output.item, "user": output.user}.get(key, key) for key in self.keys]

    @property
    def table(self) -> FeatureTable:
        """Description of the files, with parallel lists that copy unchanging columns of items."""
        items, parallel_lists = self.config.items, dict[str, str]()
        if self.keys == ("item",) and items is not None and items.valid_from is None:
            parallel_lists = {
                name: parallel.column
                for name, parallel in self.config.parallels.items()
                if parallel.column in items.columns
                and (parallel.at_least, parallel.scale) == (None, 1)
            }
        max_age = {name: count.max_age for name, count in self.counts.items()}
        return FeatureTable(self.by, [*self.columns, *self.counts], max_age, parallel_lists)

    def write(self, engine: SqlEngine, folder: Path, time: int, stage: str) -> None:
        """Write a row per id, with `time` beside each count; `stage` names a new stage to use."""
        if self.counts:
            keys = {event_key(name): quoted(event_key(name)) for name in self.keys}
            samples = (
                f"(SELECT DISTINCT {', '.join(keys.values())}, 0 AS position, "
                f"CAST({time} AS BIGINT) AS ts FROM past_events)"
            )
            make_counts(engine, stage, samples, keys, self.counts, list(keys))
        query = f"{self._query(stage, time)} ORDER BY {listed(self.by)}"
        engine.write(query, folder / self.table.name)

    def _query(self, stage: str, time: int) -> str:
        """Return SQL of the rows, without rows of zero counts only: missing counts are 0, too."""
        ids = [quoted(event_key(name)) for name in self.keys]
        columns = {name: f"k.{key}" for key, name in zip(ids, self.by)}
        source, where = f"SELECT DISTINCT {', '.join(ids)} FROM past_events", ""
        joins = []
        if self.columns:
            snapshots, latest = f"{self.keys[0]}_snapshots", self.config.latest
            source += f" UNION SELECT id AS {ids[0]} FROM {snapshots}"
            joins.append(
                f"LEFT JOIN {snapshots} t ON k.{ids[0]} = t.id AND t.valid_from <= {latest} "
                f"AND t.valid_until > {latest}"
            )
        for name, feature in self.columns.items():
            column = f"t.{quoted(f'f_{name}')}"
            column = f"CAST({column} AS FLOAT)" if feature.kind == "dense" else column
            columns[name] = filled(column, feature.fill)
        if self.counts:
            equal_keys = " AND ".join(f"k.{key} = c.{key}" for key in ids)
            joins.append(f"LEFT JOIN {stage} c ON {equal_keys}")
        for name in self.counts:
            columns[name] = f"CAST(coalesce(c.{quoted(f'n_{name}')}, 0) AS FLOAT)"
            columns[f"{name}@"] = f"CAST({time} AS BIGINT)"
        if not self.columns:
            has_count = " OR ".join(f"c.{quoted(f'n_{name}')} > 0" for name in self.counts)
            where = f"WHERE ({has_count})"
        has_ids = " AND ".join(f"{key} IS NOT NULL" for key in ids)
        source = f"SELECT * FROM ({source}) WHERE {has_ids}"
        return f"SELECT {aligned(columns, columns)} FROM ({source}) k {' '.join(joins)} {where}"


def id_features(config: EventsConfig) -> list[IdFeatures]:
    """Return the features of each set of keys, without `context`, which belongs to a row."""
    features: dict[tuple[str, ...], IdFeatures] = {
        (name,): IdFeatures(config, (name,), table.columns, {})
        for name, _, table in snapshot_tables(config)
        if table.columns
    }
    for name, count in config.counts.items():
        keys = tuple(dict.fromkeys(count.of))
        features.setdefault(keys, IdFeatures(config, keys, {}, {})).counts[name] = count
    return list(features.values())


def write_last_features(engine: SqlEngine, config: EventsConfig, folder: Path, time: int) -> None:
    """Write each table of features of ids to `folder/NAME`."""
    for number, features in enumerate(id_features(config)):
        features.write(engine, folder, time, f"last_counts_{number}")
