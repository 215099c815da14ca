"""A log of some days with features of items and users, and the rows of its requests by loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import predict

DAY, START = 86_400, 1_789_948_800  # 2026-09-21 in UTC
DAYS, EVENTS_A_DAY, CANDIDATES = 12, 120, 4
CONFIG: dict[str, Any] = {
    "events": {"log": {"path": "log.parquet", "action": "type", "columns": ["offer", "when"]}},
    "items": {
        "path": "items.parquet",
        "valid_from": "since",
        "columns": {
            "brand": "id",
            "maker": {"kind": "id", "fill": "none"},
            "cost": {"kind": "dense", "fill": 2.5},
            "tags": "ids",
        },
    },
    "users": {"path": "users.parquet", "columns": {"city": {"kind": "id", "fill": "nowhere"}}},
    "labels": {"bought": {"action": "buy"}},
    "context": {"offer": {"kind": "dense", "fill": 0.25}, "when": "dense"},
    "histories": {
        "seen": {
            "length": 5,
            "parallel": {"seen_offer": {"column": "offer", "scale": 2, "fill": 1}},
        }
    },
    "counts": {
        "item_views": {"of": "item", "actions": "view"},
        "item_day": {"of": "item", "actions": "view", "within": "1d"},
        "user_rate": {"of": "user", "actions": "buy", "per": "view", "within": "3d"},
        "pair_views": {"of": ["user", "item"], "actions": "view"},
        "brand_buys": {"of": ["user", "brand"], "actions": "buy"},
        "maker_views": {"of": "maker", "actions": "view"},
    },
    "transforms": {
        "cost": {"kind": "dense", "transform": ["log1p", "standardize"]},
        "place": {
            "kind": "id",
            "num_embeddings": 20,
            "column": ["city", "maker"],
            "transform": ["cross", {"hash": 20}],
        },
        "hour": {
            "kind": "id",
            "num_embeddings": 3,
            "column": "when",
            "transform": [{"bucketize": {"boundaries": [20_000, 50_000]}}],
        },
    },
    "split": {"at": [0.6, 0.8]},
}


@dataclass(eq=False)
class Shop:
    """A log of some days, snapshots of its items, and its users; later days have new ones."""

    events: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    cities: dict[str, str | None] = field(default_factory=dict)
    end: int | None = None  # when counts are taken; None: right after the last event

    @staticmethod
    def of_days(days: int) -> Shop:
        """The first days of the shop."""
        random, shop = np.random.default_rng(0), Shop()
        for day in range(DAYS):
            if day < days:
                shop._add_day(day, random)
        return shop

    def _add_day(self, day: int, random: np.random.Generator) -> None:
        for number in (
            range(20 + day) if day == 0 else [19 + day, *random.choice(19, 3, replace=False)]
        ):
            self.items.append(
                {
                    "id": f"i{number}",
                    "since": START + day * DAY - (number % 2),
                    "brand": [None, "a", "b"][random.integers(3)],
                    "maker": [None, "x", "y", "z"][random.integers(4)],
                    "cost": [None, 1.0, 3.0, 7.5][random.integers(4)],
                    "tags": [None, [], ["p"], ["q", None, "p"]][random.integers(4)],
                }
            )
        for number in range(15) if day == 0 else [14 + day]:
            self.cities[f"u{number}"] = [None, "Rom", "Oslo"][random.integers(3)]
        for second in np.sort(random.choice(DAY, EVENTS_A_DAY, replace=False)).tolist():
            self.events.append(
                {
                    "user": f"u{random.integers(17 + day)}",  # of some there is no row
                    "item": f"i{random.integers(22 + day)}",
                    "time": START + day * DAY + second,
                    "type": ["view", "view", "buy"][random.integers(3)],
                    "offer": [None, 0.5, 1.0][random.integers(3)],
                    "when": second,
                }
            )

    def write(self, folder: Path) -> Path:
        """Write the files and their description; return the dataset that they make."""
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.events), folder / "log.parquet")
        pq.write_table(pa.Table.from_pylist(self.items), folder / "items.parquet")
        users = {"id": [*self.cities], "city": [*self.cities.values()]}
        pq.write_table(pa.table(users), folder / "users.parquet")
        (folder / "events.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
        prepare_events(folder / "events.yaml", folder / "data")
        return folder / "data"

    def item(self, name: str | None, time: float) -> dict[str, Any]:
        """The snapshot of an item at a time, with fills."""
        valid = [row for row in self.items if row["id"] == name and row["since"] <= time]
        empty = dict.fromkeys(("brand", "maker", "cost", "tags"))
        row = max(valid, key=lambda row: row["since"]) if valid else empty
        row = row | {"maker": row["maker"] or "none"}
        return row | {"cost": 2.5 if row["cost"] is None else row["cost"]}

    def row(self, request: dict[str, Any], item: str | None) -> dict[str, Any]:
        """The row that `predict` reads for a candidate of a request, right after the log."""
        user, end = request["user"]["user"], self.counted_until
        features = self.item(item, end)
        row = {**request["user"], **request["history"], "item": item}
        row |= {name: features[name] for name in ("brand", "maker", "cost", "tags")}
        row["city"] = self.cities.get(user) or "nowhere"

        counts = {
            name: counter[one]
            for name, counter, one in (
                ("views", self.count("view", 3, "user"), (user,)),
                ("item_views", self.count("view", DAYS, "item"), (item,)),
                ("item_day", self.count("view", 1, "item"), (item,)),
                ("user_rate", self.count("buy", 3, "user"), (user,)),
                ("pair_views", self.count("view", DAYS, "user", "item"), (user, item)),
                ("brand_buys", self.count("buy", DAYS, "user", "brand"), (user, features["brand"])),
                ("maker_views", self.count("view", DAYS, "maker"), (features["maker"],)),
            )
        }
        views = counts.pop("views")
        return row | counts | {"user_rate": counts["user_rate"] / views if views else 0.0}

    @property
    def counted_until(self) -> int:
        """The time at which requests come."""
        return self.end or 1 + max(event["time"] for event in self.events)

    @cache  # noqa: B019 - a shop lives as long as its test
    def count(self, action: str, days: int, *names: str) -> Counter[tuple[Any, ...]]:
        """The events of the last days by ids, which are those at the time of each event."""
        end = self.counted_until
        counter: Counter[tuple[Any, ...]] = Counter()
        for event in self.events:
            snapshot = self.item(event["item"], event["time"])
            ids = {**snapshot, **event}
            key = tuple(ids[name] for name in names)
            if event["type"] == action and event["time"] >= end - days * DAY and None not in key:
                counter[key] += 1
        return counter

    def requests(self, number: int, seed: int) -> Iterator[dict[str, Any]]:
        """Requests of ids alone, also of users and items that nothing is known of."""
        random = np.random.default_rng(seed)
        users, items = [f"u{i}" for i in range(35)], [f"i{i}" for i in range(40)]
        for _ in range(number):
            length = int(random.integers(4))
            yield {
                "user": {
                    "user": [*users, None][random.integers(36)],
                    "offer": [None, 0.5][random.integers(2)],
                    "when": int(random.integers(DAY)),
                },
                "history": {
                    "seen": random.choice(items, length).tolist(),
                    "seen_offer": [[None, 0.5, 0.25][i] for i in random.integers(3, size=length)],
                },
                "candidates": random.choice(items, CANDIDATES).tolist(),
            }


def predictions(
    run: Path, shop: Shop, requests: list[dict[str, Any]], out: Path, columns: pa.Schema
) -> np.ndarray:
    """What `predict` gives for the rows of requests, [R, N, 1], with the `columns` of a dataset."""
    rows = [shop.row(request, item) for request in requests for item in request["candidates"]]
    out.mkdir()
    types = [columns.field(name) for name in rows[0]]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(types)), out / "rows.parquet")
    with joined_ranks("cpu") as ranks:
        predict(run, [str(out / "rows.parquet")], out / "scores.parquet", None, ranks, "cpu")
    scores = pq.read_table(out / "scores.parquet")["prediction_bought"].to_numpy()
    return scores.reshape(len(requests), CANDIDATES, 1)
