"""Settings of `recsys prepare events`: the content of its `events.yaml`."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from recsys.data.events.times import Calendar, duration, moment, now
from recsys.data.schema_columns import Column

IMPRESSION = "impression"  # the action of impressions
TimeUnit = Literal["s", "ms", "us"]
SplitBy = Literal["time", "dates", "user", "leave_last", "windows"]


@dataclass
class Source:
    """Files of one table, and the format of their times."""

    # Parquet or CSV: a file, a folder (with `key=value/` parts, if any), a pattern such as
    # logs/*.csv, a URL, or a list of them.
    path: str | list[str]
    time_unit: TimeUnit = "s"  # unit of times that are integers
    time_zone: str = "UTC"  # zone of timestamps and ISO strings without one
    header: list[str] | None = None  # column names, for text files without a header line
    delimiter: str | None = None  # in text files; None: tab in .tsv, else comma
    in_quotes: bool = True  # in text files, values may be in double quotes
    # Format of times that are text but not ISO, for strptime, such as "%d/%m/%Y %H:%M".
    time_format: str | None = None


@dataclass
class Several:
    """Format of an item column that holds several items: lists, or texts such as `N1-1 N2-0`."""

    between: str = " "  # text between two items
    column: str | None = None  # new column for the number after each item; None: no numbers
    separator: str = "-"  # text between an item and its number


Value = bool | int | float | str


@dataclass
class EventTable(Source):
    """Actions of users on items, or impressions."""

    user: str = "user"
    item: str = "item"
    time: str = "time"
    action: str | None = None  # a column; None: every row's action is the table's name
    request: str | None = None  # a column in which a row and the actions that label it must agree
    arrived: str | None = None  # a time column: when the event became known; None: at its time
    columns: list[str] = field(default_factory=list)  # for labels, context and parallel lists
    several: Several | None = None  # set if a row holds several items; each becomes a row
    where: dict[str, Value | list[Value]] = field(default_factory=dict)  # values of rows to read


@dataclass
class Feature:
    """A column that samples have."""

    kind: Literal["id", "ids", "dense"]
    # Replaces null. None: a sample with null is dropped; with exact vocabularies, null ids stay.
    fill: int | float | str | None = None


@dataclass
class Snapshots(Source):
    """A table with one row per id, or several of which the latest at a sample's time is valid."""

    id: str = "id"
    valid_from: str | None = None  # a time column; None: one row per id, valid at all times
    columns: dict[str, Feature] = field(default_factory=dict)  # become features of samples


@dataclass
class Content:
    """A column of the dataset's items."""

    kind: Literal["text", "image", "feature", "category", "other"]
    # For kind image: the column of file names; the files' bytes become the content.
    path_column: str | None = None
    folder: str | None = None  # their folder or URL; None: the folder of all relative paths


@dataclass
class ItemTable(Snapshots):
    """The items; their last snapshot becomes `items/` of the dataset."""

    content: dict[str, Content] = field(default_factory=dict)


@dataclass
class Label:
    """Value to predict: an action, or a number of the row."""

    action: list[str] | None = None  # the label is 1 if the user did one of these on the item
    # Time after the row in which the action counts, if it is strictly later; see `attribute`.
    # None: the row's own action decides.
    within: str | None = None
    column: str | None = None
    at_least: float | None = None  # label 1 from this value on; None: the column holds 0 and 1


@dataclass
class Weight:
    """Weigh rows in losses and metrics by a column, or else by labels and actions."""

    column: str | None = None
    labels: dict[str, float] = field(default_factory=dict)  # by label; the first label of 1 counts
    actions: dict[str, float] = field(default_factory=dict)  # of other rows, by their own action
    # Weight of remaining rows and of drawn negatives. None: rows without a weight are left out.
    fill: float | None = 1.0

    @property
    def drawn(self) -> float:
        return 1.0 if self.fill is None else self.fill


@dataclass
class Negatives:
    """Draw negatives for rows whose first label is 1, from items that existed at the row's time.

    Items that the user had acted on by then are never drawn. In valid and test, neither are the
    user's positives of that split.
    """

    per_positive: int = 1
    by: Literal["uniform", "popularity"] = "uniform"  # popularity: by the events so far
    # A time column of `items`: an item exists from that moment on, if its first event is later.
    # None, or an item without a value: from its first event or snapshot on.
    available_from: str | None = None
    # Number of events that popularity adds to each existing item's own (additive smoothing).
    # None: 1 (Laplace's) with available_from, else 0, so that items without events are not drawn.
    smoothing: float | None = None
    seed: int = 0

    @property
    def events_per_item(self) -> float:
        """Number of events added to each item's own; with uniform draws, no own events count."""
        if self.by == "uniform":
            return 1.0
        default = 0.0 if self.available_from is None else 1.0
        return default if self.smoothing is None else self.smoothing


@dataclass
class Parallel:
    """A list beside a history, with one value per event."""

    column: str  # a column of events or items; or age (log10(1 + days) / 2), or action
    at_least: float | None = None  # values become 1 from this one on, else 0
    scale: float = 1.0  # divisor of the values
    fill: float = 0.0  # value instead of null; null ids are unknown

    @property
    def stored_fill(self) -> float:
        """Value that replaces null in lists: `fill`, scaled like other values."""
        if self.at_least is not None:
            return float(np.float32(self.fill) >= self.at_least)
        return float(np.float32(self.fill) / np.float32(self.scale))


@dataclass
class History:
    """The user's last events before a sample."""

    actions: list[str] | None = None  # None: all but impressions
    length: int = 50
    delay: str = "0s"  # time until an event is known; younger events are left out
    parallel: dict[str, Parallel] = field(default_factory=dict)


@dataclass
class Count:
    """Number of earlier events with the sample's user, item or both; or a rate of two numbers."""

    of: list[str]  # user, item, or id columns of the items
    actions: list[str] | None = None  # None: all but impressions
    per: list[str] | None = None  # divide by the number of these actions; 0 if there are none
    within: str = "all"
    delay: str = "0s"
    max_age: str = "all"  # age of the last known number from which requests are scored with 0


@dataclass
class Split:
    """Which samples are train, valid and test."""

    by: SplitBy = "time"
    # time, user: quantiles at which train, valid (and test) end; dates: when valid, test (and
    # nothing) begin.
    at: list[float | str] = field(default_factory=lambda: [0.8, 0.9])
    windows: int = 5  # datasets by windows, each tested on one of the last tenths of time
    last: int = 1  # leave_last: rows of each user in test, and in valid before them


@dataclass
class Drop:
    """Events that are left out."""

    duplicates: bool = True  # keep the first of equal user, item, time, action and request
    later_than: str | None = None  # an ISO time; None: now
    max_events_per_user: int | None = None  # leave out a user's later events, as of robots
    # With `--until`: rows that arrive later than this after their time are left out. The state
    # keeps all events of this time.
    late_rows: str = "7d"


@dataclass
class Vocabulary:
    """Mapping of ids to rows of tables."""

    kind: Literal["exact", "rows"] = "exact"  # rows: ids are rows of tables already
    # By column: occurrences, up to the last training sample, for which an id gets its own row.
    min_count: dict[str, int] = field(default_factory=dict)
    headroom: float = 0.0  # free rows of each table for ids of later days, as a share of the ids


@dataclass
class Output:
    """Names of the columns that every dataset has."""

    user: str = "user"
    item: str = "item"
    time: str = "time"
    time_unit: TimeUnit = "us"
    weight: str = "weight"  # with `weight`
    sampled: str = "sampled"  # with `negatives`: 1 in rows with a drawn item


@dataclass
class EventsConfig:
    """All settings of `recsys prepare events`; see the page of `recsys/data`."""

    events: dict[str, EventTable]
    labels: dict[str, Label]
    impressions: EventTable | None = None
    items: ItemTable | None = None
    users: Snapshots | None = None
    rows: list[str] | None = None  # actions that become samples, without impressions
    # Rows that an action labels. last: the user's last row with the item before the action; all:
    # each row whose `within` contains the action.
    attribute: Literal["last", "all"] = "last"
    unripe: Literal["drop", "keep"] = "drop"  # rows whose `within` ends after the log
    # Leave out train (valid) rows whose `within` ends after valid (test) begins.
    embargo: bool = True
    context: dict[str, Feature] = field(default_factory=dict)  # columns of the sample's own row
    weight: Weight | None = None
    # Numeric columns of the sample's own row that are known later, only for losses; may be null.
    late: list[str] = field(default_factory=list)
    negatives: Negatives | None = None
    histories: dict[str, History] = field(default_factory=dict)
    counts: dict[str, Count] = field(default_factory=dict)
    split: Split = field(default_factory=Split)
    partition: Literal["day", "hour"] = "day"  # of rows, with --until and --follow
    # Columns of `schema.yaml` that are computed from others, or replace a feature.
    transforms: dict[str, Column] = field(default_factory=dict)
    drop: Drop = field(default_factory=Drop)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    output: Output = field(default_factory=Output)

    @property
    def tables(self) -> dict[str, EventTable]:
        """Tables of events and impressions, by action."""
        impressions = {IMPRESSION: self.impressions} if self.impressions else {}
        return {**self.events, **impressions}

    @property
    def time_zone(self) -> str | None:
        """Time zone of dates in these settings, that of all tables of events; None: they differ."""
        zones = {table.time_zone for table in self.tables.values()}
        return zones.pop() if len(zones) == 1 else None

    @property
    def row_tables(self) -> list[EventTable]:
        """Tables whose rows may become samples."""
        return [self.impressions] if self.impressions else [*self.events.values()]

    @property
    def calendar(self) -> Calendar:
        return Calendar(self.time_zone or "UTC", self.partition)

    @property
    def latest(self) -> int:
        """Time in microseconds after which events are ignored; default: now."""
        later_than = self.drop.later_than
        return now() if later_than is None else moment(later_than, self.time_zone)

    @property
    def available_from(self) -> str | None:
        """Column of `items` with the time from which each item may be drawn as a negative."""
        return None if self.negatives is None else self.negatives.available_from

    @property
    def has_arrival(self) -> bool:
        return any(table.arrived is not None for table in self.tables.values())

    @property
    def arrival(self) -> str:
        """Column of `clean_events` with the time from which an event is known."""
        return "arrived" if self.has_arrival else "ts"

    @property
    def by_request(self) -> bool:
        """Whether a row and the actions that label it must have the same request."""
        return any(table.request is not None for table in self.row_tables)

    @property
    def label_window(self) -> int:
        """Microseconds after a row until all of its labels are decided."""
        windows = [duration(label.within) for label in self.labels.values() if label.within]
        return max((window or 0 for window in windows), default=0)

    @property
    def ripe_after(self) -> int:
        """Microseconds after a row until it may be written."""
        return self.label_window if self.unripe == "drop" else 0

    @property
    def item_features(self) -> dict[str, Feature]:
        return self.items.columns if self.items else {}

    @property
    def features(self) -> dict[str, Feature]:
        return {**self.context, **self.item_features, **(self.users.columns if self.users else {})}

    @property
    def parallels(self) -> dict[str, Parallel]:
        by_history = [history.parallel for history in self.histories.values()]
        return {name: parallel for lists in by_history for name, parallel in lists.items()}

    @property
    def actions(self) -> dict[str, list[str] | None]:
        return {
            "rows": self.rows,
            **{f"labels.{name}.action": label.action for name, label in self.labels.items()},
            "weight.actions": None if self.weight is None else [*self.weight.actions] or None,
            **{f"histories.{name}.actions": h.actions for name, h in self.histories.items()},
            **{f"counts.{name}.actions": count.actions for name, count in self.counts.items()},
            **{f"counts.{name}.per": count.per for name, count in self.counts.items()},
        }
