"""Datasets that grow by days: however many calls make them, and wherever these are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.events.sql import DuckDBEngine
from recsys.data.schema import load_schema
from recsys.storage.location import Location

HOUR = 3_600
DAY = 24 * HOUR
START = 1_789_948_800  # 2026-09-21 in UTC
KILL_AT = (3, 15, 27, 30, 33, 36, 39)  # steps of a call
DAYS = [f"2026-09-{day}" for day in range(21, 29)]
CONTENT: dict[str, Any] = {
    "events": {
        "log": {
            "path": "log",
            "action": "action",
            "arrived": "arrived",
            "columns": ["price"],
        },
        "more": {"path": "more", "action": "action", "arrived": "arrived"},
    },
    "items": {
        "path": "items.parquet",
        "valid_from": "since",
        "columns": {"brand": "id", "cost": {"kind": "dense", "fill": 0}},
        "content": {"title": "text"},
    },
    "users": {
        "path": "users",
        "valid_from": "since",
        "columns": {"country": {"kind": "id", "fill": "none"}},
    },
    "rows": ["view", "share"],
    "labels": {
        "bought": {"action": "buy", "within": "1d"},
        "acted": {"action": ["buy", "share"], "within": "36h"},
    },
    "context": {"price": {"kind": "dense", "fill": 1}},
    "negatives": {"per_positive": 2, "by": "popularity"},
    "histories": {
        "viewed": {
            "actions": "view",
            "length": 3,
            "delay": "1h",
            "parallel": {"viewed_age": "age", "viewed_brand": "brand", "viewed_price": "price"},
        },
        "past": {"length": 4, "parallel": {"past_action": "action"}},
    },
    "counts": {
        "user_all": {"of": "user"},
        "user_day": {"of": "user", "within": "1d", "delay": "30m"},
        "item_rate": {"of": "item", "actions": "buy", "per": "view"},
        "brand_buys": {"of": ["user", "brand"], "actions": "buy"},
        "item_views": {"of": "item", "actions": "view", "within": "3d"},
    },
    "drop": {"late_rows": "2d", "later_than": "2027-01-01"},
}
CASES: dict[str, dict[str, Any]] = {
    "last": {},
    "all": {
        "attribute": "all",
        "drop": {**CONTENT["drop"], "duplicates": False},
        "negatives": {"per_positive": 1},
        "weight": {"labels": {"bought": 3}},
        "late": ["price"],
        "context": {},
    },
    "kept": {"unripe": "keep", "negatives": None},
    "rows": {
        "vocabulary": {"kind": "rows", "headroom": 0.5},
        "items": None,
        "users": None,
        "histories": {"viewed": {"actions": "view", "length": 2}},
        "counts": {},
        "events": {
            name: {**table, "user": "user_row"} for name, table in CONTENT["events"].items()
        },
    },
}


def log(seed: int, late: bool) -> pa.Table:
    """Events with ties in time and repeats, a part of which arrive hours and days late.

    Some users come back after days.
    """
    random = np.random.default_rng(seed)
    number = 700
    user = random.integers(0, 12, number)
    day = random.integers(0, 7, number)
    day = np.where((user > 8) & (day < 6), 0, day)
    time = START + day * DAY + random.integers(0, 24 * 4, number) * HOUR // 4
    lateness = random.choice([0, 0, 0, HOUR, 20 * HOUR, 30 * HOUR, 60 * HOUR], number) * late
    rows = {
        "user": pa.array([f"u{one}" for one in user]),
        "user_row": user,
        "item": random.integers(0, 25, number),
        "time": time,
        "arrived": time + lateness,
        "action": random.choice(["view", "view", "buy", "buy", "share"], number),
        "price": random.integers(0, 9, number) / 2,
    }
    table = pa.table(rows)
    again = random.integers(0, number, 60)
    copies = table.take(pa.array(again))
    shift = random.integers(0, 3, 60) * DAY * late
    copies = copies.set_column(4, "arrived", pa.array(copies["arrived"].to_numpy() + shift))
    return pa.concat_tables([table, copies])


def items(day: int) -> pa.Table:
    """Snapshots by a day: each day changes some items and brings others."""
    random = np.random.default_rng(5)
    rows = [
        {"id": item, "since": START + change * DAY, "number": int(random.integers(0, 3))}
        for change in range(8)
        for item in range(30)
        if (change == 0 and item < 20) or random.random() < 0.2
    ]
    rows = [row for row in rows if row["since"] <= START + day * DAY]
    return pa.table(
        {
            "id": [row["id"] for row in rows],
            "since": [row["since"] for row in rows],
            "brand": [f"b{row['number']}" if row["number"] else None for row in rows],
            "cost": [float(row["number"]) for row in rows],
            "title": [f"item {row['id']}, {row['since']}" for row in rows],
        }
    )


def users(day: int) -> pa.Table:
    since = START + day * DAY
    names = [f"u{day}", f"u{day + 3}"]
    return pa.table({"id": names, "since": [since] * 2, "country": [f"c{day}", None]})


def deliver(folder: Path, table: pa.Table, day: int) -> None:
    """Write what arrives on a day, and the snapshots of that day."""
    arrived = (table["arrived"].to_numpy() - START) // DAY
    for part, name in ((0, "log"), (1, "more")):
        is_part = np.arange(len(table)) % 2 == part
        file = folder / name / f"part-{day}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(table.filter(pa.array((arrived == day) & is_part)), file)
    (folder / "users").mkdir(exist_ok=True)
    pq.write_table(users(day), folder / "users" / f"part-{day}.parquet")
    pq.write_table(items(day), folder / "items.parquet")


def write_settings(folder: Path, case: str) -> Path:
    folder.mkdir(exist_ok=True)
    content = {**CONTENT, **CASES[case]}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "events.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "events.yaml"


def content_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a dataset by folder or file; maps of ids as sets, as their order may differ."""
    folders = [*sorted((out / "train").glob("*")), *sorted((out / "features").glob("*"))]
    rows = {
        str(folder.relative_to(out)): [
            row
            for file in sorted(folder.glob("*.parquet"))
            for row in pq.read_table(file).to_pylist()
        ]
        for folder in [*folders, out / "items"]
    }
    rows["counts"] = pq.read_table(out / "item_counts.parquet").to_pylist()
    for file in sorted((out / "vocabulary").glob("*")):
        rows[file.name] = sorted(pq.read_table(file)["id"].to_pylist())
    return rows


@pytest.mark.parametrize("case", CASES)
def test_calls_day_by_day_make_the_rows_of_one_call(case: str, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "data", case)
    table = log(0, late=True)
    for number, day in enumerate(DAYS):
        deliver(tmp_path / "data", table, number)
        if number not in (1, 5):  # a call may make several days
            prepare_events(config, tmp_path / "calls", until=day)
    prepare_events(config, tmp_path / "once", until=DAYS[-1])
    calls, once = content_of(tmp_path / "calls"), content_of(tmp_path / "once")
    assert list(calls) == list(once)
    for name, rows in once.items():
        assert calls[name] == rows, name
    assert len([name for name in once if name.startswith("train")]) >= 7
    for out in (tmp_path / "calls", tmp_path / "once"):
        load_schema(Location.of(out))


def test_without_late_events_the_rows_are_those_of_a_dataset_made_at_once(tmp_path: Path) -> None:
    config, table = write_settings(tmp_path / "data", "last"), log(1, late=False)
    for number, day in enumerate(DAYS):
        deliver(tmp_path / "data", table, number)
        prepare_events(config, tmp_path / "days", until=day)
    content = yaml.safe_load(config.read_text())
    content |= {"split": {"by": "dates", "at": [DAYS[4], DAYS[5]]}, "embargo": False}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    prepare_events(config, tmp_path / "at_once")
    at_once = pq.read_table(tmp_path / "at_once" / "train").to_pylist()
    rows = content_of(tmp_path / "days")
    days = [row for name, part in rows.items() if name.startswith("train") for row in part]
    end = (START + 4 * DAY) * 10**6
    assert ordered([row for row in days if row["time"] < end]) == ordered(at_once)


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: repr(sorted(row.items())))


def test_a_call_that_was_killed_and_is_given_again_writes_the_same(tmp_path: Path) -> None:
    config, table = write_settings(tmp_path / "data", "last"), log(2, late=True)
    for number, day in enumerate(DAYS[:3]):
        deliver(tmp_path / "data", table, number)
        if number != 1:
            prepare_events(config, tmp_path / ("start" if number == 0 else "whole"), until=day)
            if number == 0:
                shutil.copytree(tmp_path / "start", tmp_path / "whole")
    process = subprocess.run(
        [sys.executable, __file__, str(config), str(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == len(KILL_AT)
    deliver(tmp_path / "data", table, 3)
    prepare_events(config, tmp_path / "whole", until=DAYS[3])
    whole = content_of(tmp_path / "whole")
    for out in killed:
        prepare_events(config, out, until=DAYS[3])
        assert content_of(out) == whole, out
        assert not list(out.glob(".ready*")) and not list(out.glob(".*.old"))


def kill_everywhere(config: Path, folder: Path) -> None:
    """Give the call of the third day in processes that die at one of its steps, then again."""
    for number in KILL_AT:
        out = folder / f"killed-{number:02}"
        shutil.copytree(folder / "start", out)
        assert in_child(config, out, number)
        assert not in_child(config, out, None)


def in_child(config: Path, out: Path, kill_at: int | None) -> bool:
    """Return whether a process that gives the call was killed at a step."""
    if (pid := os.fork()) == 0:
        steps = 0

        def counted(function: Any) -> Any:
            def step(*arguments: Any, **named: Any) -> Any:
                nonlocal steps
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1
                return function(*arguments, **named)

            return step

        for owner, name in [
            *((DuckDBEngine, name) for name in ("add", "save", "write", "write_by")),
            *((Path, name) for name in ("rename", "replace")),
        ]:
            setattr(owner, name, counted(getattr(owner, name)))
        prepare_events(config, out, until=DAYS[2])
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    kill_everywhere(Path(sys.argv[1]), Path(sys.argv[2]))
