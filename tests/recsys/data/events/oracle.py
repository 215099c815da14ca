"""What `recsys prepare events` must write, by loops over lists of plain Python.

An event is a dictionary with uid, iid, ts (microseconds), action, request and columns; the order of
the list is that of the files. A snapshot has id, valid_from and columns.
"""

import math
from collections import Counter
from typing import Any

import numpy as np

from recsys.data.events.settings import EventsConfig, History, Parallel, Snapshots, Weight
from recsys.data.events.times import duration

Row = dict[str, Any]


def usable(config: EventsConfig, log: list[Row], latest: int, capped: bool = True) -> list[Row]:
    rows, keys = [], set()
    for index, event in enumerate(log):
        has_arrival = config.has_arrival and event["action"] != "impression"
        arrived = max(event["arrived"] if has_arrival else event["ts"], event["ts"])
        rows.append({**event, "place": index, "arrived": arrived})
    usable_rows = []
    for row in sorted(rows, key=lambda row: (row["arrived"], row["place"])):
        required = [row[name] for name in ("uid", "iid", "ts", "action")]
        key = (*required, row["request"] if config.by_request else None)
        if None in required or row["ts"] > latest or (config.drop.duplicates and key in keys):
            continue
        keys.add(key)
        usable_rows.append(row)
    cap = (capped and config.drop.max_events_per_user) or math.inf
    events: Counter[str] = Counter()
    first = []
    order = ("arrived", "ts", "iid", "action", "place")
    for row in sorted(usable_rows, key=lambda row: [row[name] for name in order]):
        events[row["uid"]] += 1
        if events[row["uid"]] <= cap:
            first.append(row)
    return sorted(first, key=lambda row: row["place"])


def snapshot(table: list[Row], key: Any, ts: int) -> Row:
    valid = [row for row in table if row["id"] == key and row["valid_from"] <= ts]
    return max(valid, key=lambda row: row["valid_from"]) if valid else {}


def labelled(config: EventsConfig, log: list[Row]) -> list[Row]:
    actions = ["impression"] if config.impressions else config.rows
    candidates = [
        one
        for one in log
        if (one["action"] in actions if actions else one["action"] != "impression")
    ]
    pair = ["uid", "iid", *(["request"] if config.by_request else [])]
    end = max(one["ts"] for one in log) - config.label_window
    rows = []

    def last(pair: list[str], event: Row) -> int:
        """The last moment before an event at which its user had a row with its item."""
        return max(
            other["ts"]
            for other in candidates
            if other["ts"] < event["ts"] and all(other[field] == event[field] for field in pair)
        )

    for row in candidates:
        if config.label_window and config.unripe == "drop" and row["ts"] > end:
            continue
        labels: Row = {}
        for name, label in config.labels.items():
            if label.column:
                value = row.get(label.column)
                if value is not None and label.at_least is not None:
                    value = float(value >= label.at_least)
                labels[name] = value
            elif label.within is None:
                labels[name] = float(row["action"] in label.action)
            else:
                labels[name] = float(
                    any(
                        event["action"] in label.action
                        and all(event[field] == row[field] is not None for field in pair)
                        and 0 < event["ts"] - row["ts"] <= duration(label.within)
                        and (config.attribute == "all" or row["ts"] == last(pair, event))
                        for event in log
                    )
                )
        context = {
            name: row.get(name) if row.get(name) is not None else feature.fill
            for name, feature in config.context.items()
        }
        required = [
            context[name] for name, feature in config.context.items() if feature.kind == "dense"
        ]
        late: Row = {name: row.get(name) for name in config.late}
        if config.weight:
            late["weight"] = weight(config.weight, row, labels)
            required.append(late["weight"])
        if None not in [*labels.values(), *required]:
            rows.append({**row, "labels": labels, "context": context, "late": late})
    return rows


def weight(settings: Weight, row: Row, labels: Row) -> float | None:
    for name, value in settings.labels.items():
        if labels[name] == 1:
            return value
    value = settings.actions.get(row["action"])
    value = row.get(settings.column) if settings.column else value
    return settings.fill if value is None else value


def split_of(config: EventsConfig, rows: list[Row]) -> dict[str, list[str | None]]:
    """By dataset, the split of each row."""
    if not rows:
        return {"": []}
    times = np.array([row["ts"] for row in rows])
    split = config.split
    if split.by == "user":
        names: list[str | None] = []
        for row in rows:
            user_times = [other["ts"] for other in rows if other["uid"] == row["uid"]]
            older = sum(ts < row["ts"] for ts in user_times)
            ends = [older <= share * (len(user_times) - 1) for share in split.at]
            names.append("train" if ends[0] else "valid" if ends[1] else "test")
        return {"": without_embargo(config, rows, names, by_user=True)}
    if split.by == "leave_last":
        names = []
        for number, row in enumerate(rows):
            user_rows = [n for n, other in enumerate(rows) if other["uid"] == row["uid"]]
            user_rows.sort(key=lambda n: (rows[n]["ts"], n))
            index, total = user_rows.index(number), len(user_rows)
            is_test = index >= max(total - split.last, 1)
            is_valid = index >= max(total - 2 * split.last, 1)
            names.append("test" if is_test else "valid" if is_valid else "train")
        return {"": without_embargo(config, rows, names, by_user=True)}
    if split.by == "windows":
        first = 10 - split.windows
        cuts = {
            f"window-{n}": [(first + n + k) / 10 for k in (-2, -1, 0)]
            for n in range(1, split.windows + 1)
        }
    else:
        cuts = {"": [*split.at, 1.0]}
    datasets = {}
    for name, shares in cuts.items():
        ends = np.quantile(times, shares, method="lower")
        datasets[name] = [
            next((s for s, end in zip(("train", "valid", "test"), ends) if ts <= end), None)
            for ts in times
        ]
        datasets[name] = without_embargo(config, rows, datasets[name], ends=ends)
    return datasets


def without_embargo(
    config: EventsConfig,
    rows: list[Row],
    names: list[str | None],
    ends: Any = (),
    by_user: bool = False,
) -> list[str | None]:
    """Splits without rows of which a label is decided after the next split begins."""
    if not (config.embargo and config.label_window):
        return names
    result: list[str | None] = []
    for row, name in zip(rows, names, strict=True):
        decided = row["ts"] + config.label_window
        index = ("train", "valid", "test", None).index(name)
        if by_user:
            begins = [
                other["ts"]
                for other, split in zip(rows, names, strict=True)
                if other["uid"] == row["uid"]
                and ("train", "valid", "test").index(split or "train") > index
            ]
            crosses = index < 2 and bool(begins) and decided >= min(begins)
        else:
            crosses = index < 2 and decided > ends[index]
        result.append(None if crosses else name)
    return result


def history_of(events: list[Row], row: Row, window: Any, actions: list[str] | None) -> list[Row]:
    cut = row["ts"] - (duration(window.delay) or 0)
    within = duration(getattr(window, "within", "all"))
    return [
        event
        for event in events
        if (event["action"] in actions if actions else event["action"] != "impression")
        and event["ts"] < cut
        and event["arrived"] <= row["ts"]
        and (within is None or event["ts"] >= cut - within)
    ]


def history(events: list[Row], row: Row, settings: History, items: list[Row]) -> Row:
    user_events = [
        event
        for event in history_of(events, row, settings, settings.actions)
        if event["uid"] == row["uid"]
    ]
    user_events = sorted(user_events, key=lambda e: (e["ts"], e["iid"], e["place"]))[
        -settings.length :
    ]
    values = {"": [event["iid"] for event in user_events]}
    for name, parallel in settings.parallel.items():
        values[name] = [value(parallel, event, row, items) for event in user_events]
    return values


def value(parallel: Parallel, event: Row, row: Row, items: list[Row]) -> Any:
    if parallel.column == "age":
        days = (row["ts"] - event["ts"]) / 86_400_000_000
        return float(np.float32(np.log10(1 + days) / 2))
    if parallel.column == "action":
        return event["action"]
    if parallel.column == "brand":
        return snapshot(items, event["iid"], event["ts"]).get("brand")
    number = event.get(parallel.column)
    number = parallel.fill if number is None else number
    if parallel.at_least is not None:
        return float(number >= parallel.at_least)
    return float(np.float32(number) / np.float32(parallel.scale))


def features(table: Snapshots | None, rows: list[Row], key: Any, ts: int) -> Row:
    if table is None:
        return {}
    valid = snapshot(rows, key, ts)
    return {
        name: valid.get(name) if valid.get(name) is not None else feature.fill
        for name, feature in table.columns.items()
    }


def count(
    config: EventsConfig, events: list[Row], row: Row, feature: Any, items: list[Row]
) -> float:
    key = [ids_of(row, items)[name] for name in feature.of]
    matches = [e for e in events if [ids_of(e, items)[name] for name in feature.of] == key]
    return number([] if None in key else matches, row, feature)


def ids_of(row: Row, items: list[Row]) -> Row:
    brand = snapshot(items, row["iid"], row["ts"]).get("brand")
    return {"user": row["uid"], "item": row["iid"], "brand": brand}


def number(matches: list[Row], row: Row, feature: Any) -> float:
    """A count of events, or a rate."""
    events = len(history_of(matches, row, feature, feature.actions))
    if feature.per is None:
        return float(events)
    base = len(history_of(matches, row, feature, feature.per))
    return float(np.float32(events / base)) if base else 0.0


def last_features(
    config: EventsConfig, log: list[Row], items: list[Row], users: list[Row], latest: int
) -> dict[str, list[Row]]:
    """By table, what is known of each id after the last event."""
    events = usable(config, log, latest)
    end = {"ts": 1 + max(event["arrived"] for event in events)}
    sources: dict[tuple[str, ...], Row] = {("item",): {}, ("user",): {}}
    for name, feature in config.counts.items():
        sources.setdefault(tuple(feature.of), {})[name] = feature
    tables = {}
    for keys, counts in sources.items():
        table, snapshots = {"item": (config.items, items), "user": (config.users, users)}.get(
            keys[0] if len(keys) == 1 else "", (None, [])
        )
        ids = {tuple(ids_of(event, items)[name] for name in keys) for event in events}
        rows = []
        for key in ids | ({(row["id"],) for row in snapshots} if table else set()):
            matches = [e for e in events if tuple(ids_of(e, items)[k] for k in keys) == key]
            row = dict(zip(keys, key)) | features(table, snapshots, key[0], latest)
            numbers = {name: number(matches, end, feature) for name, feature in counts.items()}
            if None not in key and (table or any(numbers.values())):
                rows.append(row | numbers | {f"{name}@": end["ts"] for name in counts})
        tables["-".join(keys)] = sorted(rows, key=lambda row: [row[name] for name in keys])
    return tables


def datasets(
    config: EventsConfig,
    log: list[Row],
    items: list[Row],
    users: list[Row],
    latest: int,
) -> dict[str, dict[str, list[Row]]]:
    """By dataset and split, the rows in order."""
    events = usable(config, log, latest)
    places = {event["place"] for event in events}
    rows = labelled(config, usable(config, log, latest, capped=False))
    rows = [row for row in rows if row["place"] in places]
    splits = split_of(config, rows)
    result: dict[str, dict[str, list[Row]]] = {}
    for dataset, names in splits.items():
        result[dataset] = {"train": [], "valid": [], "test": []}
        for row, split in zip(rows, names, strict=True):
            if split is not None:
                row["splits"] = [*row.get("splits", []), (dataset, split)]
    for row in sorted(rows, key=lambda r: (r["ts"], r["uid"], r["iid"], r["place"])):
        item_features = features(config.items, items, row["iid"], row["ts"])
        user_features = features(config.users, users, row["uid"], row["ts"])
        if "cost" in item_features and item_features["cost"] is None:
            continue
        sample = {"user": row["uid"], "item": row["iid"]}
        for name, settings in config.histories.items():
            lists = history(events, row, settings, items)
            sample |= {parallel or name: values for parallel, values in lists.items()}
        sample |= {**row["context"], **item_features, **user_features}
        for name, settings in config.counts.items():
            sample[name] = count(config, events, row, settings, items)
        sample |= {**row["labels"], **row["late"], "time": row["ts"]}
        for dataset, split in row.get("splits", []):
            result[dataset][split].append(sample)
    return result


def vocabulary(
    config: EventsConfig,
    log: list[Row],
    items: list[Row],
    train: list[Row],
    latest: int,
) -> dict[str, list[Any]]:
    """The ids of users and items, in order."""
    end = max(row["time"] for row in train)
    arrived_events = [event for event in usable(config, log, latest) if event["arrived"] <= end]
    ids = {}
    for name, column in (("user", "uid"), ("item", "iid")):
        counts = Counter(event[column] for event in arrived_events)
        min_count = config.vocabulary.min_count.get(name, 1)
        frequent = {one for one, number in counts.items() if number >= min_count}
        with_items = name == "item" and min_count == 1
        ids[name] = sorted(frequent | ({row["id"] for row in items} if with_items else set()))
    return ids
