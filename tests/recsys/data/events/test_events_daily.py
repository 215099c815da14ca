"""Datasets that grow by days: however many calls make them, and wherever these are killed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events import daily_state
from recsys.data.events.prepare import prepare_events
from recsys.data.events.sql import DuckDBEngine, SqlEngine
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.recsys.data.events.daily_logs import (
    DAY,
    DAYS,
    HOUR,
    START,
    add_file,
    content_of,
    write_small,
)

CHILD = "tests.recsys.data.events.test_events_daily"  # this module, run as a process
KILL_STEPS = (3, 27, 36)  # steps of a call
KILL_STEPS_2 = (15, 30, 33, 39)
CONTENT: dict[str, Any] = {
    "events": {
        "log": {"path": "log", "action": "action", "arrived": "arrived", "columns": ["price"]},
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
        "item_views": {"of": "item", "actions": "view", "within": "1d"},
    },
    "drop": {"late_rows": "30h", "later_than": "2027-01-01"},
}
CASES: dict[str, dict[str, Any]] = {
    "last": {},
    "all": {
        "attribute": "all",
        "negatives": None,
        "weight": {"labels": {"bought": 3}},
        "late": ["price"],
        "context": {},
    },
    "kept": {
        "unripe": "keep",
        "drop": {**CONTENT["drop"], "duplicates": False},
        "negatives": {"per_positive": 1},
        # Without a count over all time, only a user's last events are read for histories.
        "counts": {name: CONTENT["counts"][name] for name in ("user_day", "item_rate")},
    },
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
    time = START + day * DAY + random.integers(0, 24, number) * HOUR
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
    repeated_rows = random.integers(0, number, 200)
    copies = table.take(pa.array(repeated_rows))
    shift = random.choice([0, 10 * HOUR, 20 * HOUR, 3 * DAY], 200) * late
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
    start = START + day * DAY
    names = [f"u{day}", f"u{day + 3}"]
    return pa.table({"id": names, "since": [start] * 2, "country": [f"c{day}", None]})


def deliver(folder: Path, table: pa.Table, day: int) -> None:
    """Write what arrives on a day, and the snapshots of that day."""
    arrived = (table["arrived"].to_numpy() - START) // DAY
    for number, name in ((0, "log"), (1, "more")):
        is_selected = np.arange(len(table)) % 2 == number
        file = folder / name / f"part-{day}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(table.filter(pa.array((arrived == day) & is_selected)), file)
    (folder / "users").mkdir(exist_ok=True)
    pq.write_table(users(day), folder / "users" / f"part-{day}.parquet")
    pq.write_table(items(day), folder / "items.parquet")


def write_settings(folder: Path, case: str) -> Path:
    folder.mkdir(exist_ok=True)
    content = {**CONTENT, **CASES[case]}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "events.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "events.yaml"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] * (case == "kept")) for case in CASES]
)
def test_calls_day_by_day_make_the_rows_of_one_call(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_state, "MAX_CALLS", 2)
    if case != "kept":
        monkeypatch.setattr(daily_state, "MAX_APPENDED", 0)
        monkeypatch.setattr(daily_state, "MIN_DROPPED", 0)
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


def test_hours_whose_state_is_merged_make_the_rows_of_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_state, "MAX_CALLS", 3)
    config = write_small(tmp_path, partition="hour", negatives={"per_positive": 1})
    days, out = f"{DAYS[0]}/{{:02}}", tmp_path / "out"
    for hour in range(2, 18):
        add_file(tmp_path / "log" / f"{hour}.parquet", [(f"u{hour % 5}", hour, hour * HOUR - 1)])
        again = [("ann", hour // 4, hour * HOUR // 4), ("bob", hour, hour * HOUR - 1)]
        add_file(tmp_path / "buys" / f"{hour}.parquet", again)
        prepare_events(config, out, until=days.format(hour))
        calls: dict[Path, set[str]] = {}
        for file in (out / ".state").rglob("*.parquet"):
            calls.setdefault(file.parent, set()).add(file.name[:6])
        # Those that were merged are removed by the next call.
        assert max(map(len, calls.values())) <= 4
    prepare_events(config, out, until=DAYS[1])
    prepare_events(config, tmp_path / "once", until=DAYS[1])
    assert content_of(out) == content_of(tmp_path / "once")


def test_a_clock_that_begins_before_1970_ends_no_call_that_merges_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_state, "MAX_CALLS", 1)
    config = write_small(tmp_path, drop={"late_rows": "3000w"})
    for number, day in enumerate(DAYS[:3]):
        # In Berlin the first hour of 1970 is one of 1969 in UTC.
        events = [("cy", item, -START - HOUR) for item in (number, 9)]
        add_file(tmp_path / "log" / f"{number + 1}.parquet", events)
        prepare_events(config, tmp_path / "out", until=day)
    rows = content_of(tmp_path / "out")
    train = [row for name, lines in rows.items() if name.startswith("train") for row in lines]
    assert [row["item"] for row in train if row["user"] == "cy"] == [0, 9, 1, 2]


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
    days = [row for name, lines in rows.items() if name.startswith("train") for row in lines]
    end = (START + 4 * DAY) * 10**6
    assert ordered([row for row in days if row["time"] < end]) == ordered(at_once)


@pytest.mark.long
def test_spark_goes_on_from_days_of_duckdb_and_back_with_the_same_rows(
    open_spark: Callable[[Path], SqlEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_state, "MAX_APPENDED", 0)
    monkeypatch.setattr(daily_state, "MIN_DROPPED", 0)
    config, table = write_settings(tmp_path / "data", "last"), log(0, late=True)
    masters = {1: "local[2]", 2: None, 3: "local[2]"}
    for number, day in enumerate(DAYS[:4]):
        deliver(tmp_path / "data", table, number)
        if number in masters:  # a call may make several days
            prepare_events(config, tmp_path / "calls", spark_master=masters[number], until=day)
    prepare_events(config, tmp_path / "once", until=DAYS[3])
    assert content_of(tmp_path / "calls") == content_of(tmp_path / "once")


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: repr(sorted(row.items())))


@pytest.mark.parametrize(
    "steps", [KILL_STEPS, pytest.param(KILL_STEPS_2, marks=pytest.mark.long)], ids=["few", "others"]
)
def test_a_call_that_was_killed_and_is_given_again_writes_the_same(
    steps: tuple[int, ...], tmp_path: Path
) -> None:
    config, table = write_settings(tmp_path / "data", "last"), log(2, late=True)
    for number, day in enumerate(DAYS[:3]):
        deliver(tmp_path / "data", table, number)
        if number != 1:
            prepare_events(config, tmp_path / ("start" if number == 0 else "whole"), until=day)
            if number == 0:
                shutil.copytree(tmp_path / "start", tmp_path / "whole")
    process = subprocess.run(
        [sys.executable, "-m", CHILD, str(config), str(tmp_path), *map(str, steps)],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == len(steps)
    deliver(tmp_path / "data", table, 3)
    prepare_events(config, tmp_path / "whole", until=DAYS[3])
    full = content_of(tmp_path / "whole")
    for out in killed:
        prepare_events(config, out, until=DAYS[3])
        assert content_of(out) == full, out
        assert not list(out.glob(".ready*")) and not list(out.glob(".*.old"))


def kill_everywhere(config: Path, folder: Path, steps: list[int]) -> None:
    """Give the call of the third day in processes that die at one of its steps, then again."""
    for number in steps:
        out = folder / f"killed-{number:02}"
        shutil.copytree(folder / "start", out)
        assert in_child(config, out, number)
        assert not in_child(config, out, None)


def in_child(config: Path, out: Path, kill_step: int | None) -> bool:
    """Return whether a process that gives the call was killed at a step."""
    daily_state.MIN_DROPPED = 0
    if (pid := os.fork()) == 0:
        steps = 0

        def counted(function: Any) -> Any:
            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                if steps == kill_step:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1
                return function(*arguments, **options)

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
    kill_everywhere(Path(sys.argv[1]), Path(sys.argv[2]), [int(step) for step in sys.argv[3:]])
