"""Logs that hypothesis makes, written as files in the forms that logs have."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

LOGS = Path(__file__).parents[5] / "shared"
Row = dict[str, Any]
HOUR = 3_600_000_000
START = 1_793_440_000_000_000 // HOUR * HOUR  # around a change of summer time in Berlin
RECIPE_NOW = START + 1000 * HOUR
EARLIEST = START - 24 * HOUR

USERS = ["ann", "bob", "cy", "däwn"]
HOURS = [START + hour * HOUR for hour in range(30)]
users = st.sampled_from(USERS)
prices = st.sampled_from([None, 0.5, 3.0, 4.0, float("nan")])


def events(actions: list[str], largest: int = 90) -> st.SearchStrategy[list[Row]]:
    """Events with ties in time, duplicates, and rows that cannot be used; every action occurs."""
    row = st.fixed_dictionaries(
        {
            "uid": st.sampled_from([*4 * USERS, None]),
            "iid": st.sampled_from([*4 * list(range(5)), None]),
            "ts": st.sampled_from([*HOURS, RECIPE_NOW + HOUR]),
            "late": st.sampled_from([0, 0, 0, 0, -HOUR, HOUR, 3 * HOUR, 20 * HOUR]),
            "action": st.sampled_from(actions),
            "request": st.sampled_from(["r1", "r2"]),
            "price": prices,
        }
    )
    first = [
        {
            "uid": "ann",
            "iid": 0,
            "ts": EARLIEST,
            "late": 0,
            "action": action,
            "request": "r1",
            "price": None,
        }
        for action in dict.fromkeys(actions)
    ]
    rows = st.lists(row, min_size=largest // 2, max_size=largest)
    return rows.map(lambda drawn: [with_arrival(row) for row in [*first, *drawn]])


def with_arrival(row: Row) -> Row:
    """A row with the time at which it arrived; before its own time is as good as at it."""
    late = row["late"]
    return {**{name: row[name] for name in row if name != "late"}, "arrived": row["ts"] + late}


def snapshots(ids: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Row]]:
    row = st.fixed_dictionaries(
        {
            "id": ids,
            "valid_from": st.sampled_from([0, 0, 0, *HOURS[::8]]),
            "brand": st.sampled_from(["x", "y", None]),
            "cost": st.sampled_from([1.0, 2.5, 4.0, 7.0, None]),
        }
    )
    return st.lists(
        row, min_size=6, max_size=20, unique_by=lambda row: (row["id"], row["valid_from"])
    )


def times(rows: list[Row], name: str, form: str) -> pa.Array:
    """The times of rows in one of the forms that a log may have; see FORMS."""
    micros = [row[name] for row in rows]
    if form in ("us", "ms", "s"):
        return pa.array([one // {"us": 1, "ms": 1000, "s": 1_000_000}[form] for one in micros])
    instants = [datetime.fromtimestamp(one / 1e6, UTC) for one in micros]
    if form == "zoned":
        return pa.array(instants, pa.timestamp("ms", "America/New_York"))
    if form == "text":
        berlin = ZoneInfo("Europe/Berlin")
        return pa.array([one.astimezone(berlin).isoformat() for one in instants])
    assert form == "kolkata"  # without summer time, so that local times are unique
    local = pc.local_timestamp(pa.array(instants, pa.timestamp("us", "Asia/Kolkata")))
    return local.cast(pa.timestamp("ns"))


def log_of_people(name: str, num_users: int) -> pa.Table:
    """Events of some users of a log outside of the repository, in the order of time."""
    folder = Path(os.environ.get(f"RECSYS_{name.upper()}", LOGS / name))
    if not folder.is_dir():
        pytest.skip(f"no log in {folder}; set RECSYS_{name.upper()}")
    log = pq.read_table(folder / "events.parquet", columns=["user", "item", "time"])
    users = pc.unique(log["user"])
    users = users[:: len(users) // num_users]
    return log.filter(pc.is_in(log["user"], users)).sort_by("time")


FORMS = ("us", "ms", "s", "zoned", "text", "kolkata")
SETTINGS = {
    "kolkata": {"time_zone": "Asia/Kolkata"},
    **{unit: {"time_unit": unit} for unit in ("us", "ms", "s")},
}


def write_events(folder: Path, name: str, rows: list[Row], form: str, files: int = 2) -> Row:
    """Write rows as some files with one partition key, and return the settings of the table."""
    for number, chunk in enumerate(chunks(rows, files)):
        columns = {
            "user": pa.array([row["uid"] for row in chunk], pa.string()),
            "item": pa.array([row["iid"] for row in chunk], pa.int64()),
            "time": times(chunk, "ts", form),
            "arrived": times(chunk, "arrived", form),
            "type": pa.array([row["action"] for row in chunk], pa.string()),
            "request": pa.array([row["request"] for row in chunk], pa.string()),
            "price": pa.array([row["price"] for row in chunk], pa.float64()),
        }
        file = folder / name / f"day={number}" / "part.parquet"
        file.parent.mkdir(parents=True)
        if form == "text":
            pa_csv.write_csv(pa.table(columns), file.with_suffix(".csv"))
        else:
            pq.write_table(pa.table(columns), file, row_group_size=7)
    return {"path": name, "columns": ["price", "day"], **SETTINGS.get(form, {})}


def chunks(rows: list[Row], files: int) -> Iterator[list[Row]]:
    size = max(1, -(-len(rows) // files))
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def write_snapshots(folder: Path, name: str, rows: list[Row], kind: pa.DataType) -> Row:
    table = {
        "id": pa.array([row["id"] for row in rows], kind),
        "since": pa.array([row["valid_from"] for row in rows]),
        "brand": pa.array([row["brand"] for row in rows], pa.string()),
        "country": pa.array([row["brand"] for row in rows], pa.string()),
        "title": pa.array(["a title"] * len(rows)),
        "cost": pa.array([row["cost"] for row in rows], pa.float64()),
    }
    pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return {"path": f"{name}.parquet", "valid_from": "since", "time_unit": "us"}
