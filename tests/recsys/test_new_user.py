"""Files of a log that nobody has prepared become a served answer, without a script."""

import csv
import json
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.recsys.command_runs import run_recsys
from tests.recsys.serving.server.served_package import ServedPackage

ZONES = {"europe": "Europe/Berlin", "america": "America/New_York", "asia": "Asia/Tokyo"}
START, HOUR, HOURS = 1_789_948_800, 3_600, 800
# What a new user writes: these lines, and the commands below.
EVENTS = """\
events:
  europe:
    {path: "europe-*.csv", user: customer, item: sku, time: at, action: what,
     columns: [price], time_zone: Europe/Berlin}
  america:
    {path: "america-*.csv", user: customer, item: sku, time: at, action: what,
     columns: [price], time_zone: America/New_York}
  asia:
    {path: "asia-*.csv", user: customer, item: sku, time: at, action: what,
     columns: [price], time_zone: Asia/Tokyo}
rows: view
labels: {bought: {action: buy, within: 1d}}
context: {price: {kind: dense, fill: 0}}
histories: {viewed: {actions: view, length: 10, parallel: {viewed_age: age}}}
counts: {sku_views: {of: item, actions: view, within: 7d}}
"""
COMMANDS = (
    "prepare events --config events.yaml --out data",
    "train --config id_only --data data --out run --epochs 1",
    "export --run run --out package",
)  # and `serve package`, and one request

names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)
name_lists = st.lists(names.map("x".__add__), min_size=10, max_size=10, unique=True)
# Shifts of user, item, hour and whether it is bought from view to view, and the price.
view = st.tuples(
    *(st.integers(0, highest) for highest in (9, 9, HOURS, 1)), st.none() | st.floats(0, 1e6)
)
logs = st.tuples(name_lists, name_lists, st.lists(view, min_size=200, max_size=300))


def write_log(folder: Path, log: Any) -> dict[tuple[str, str, int], bool]:
    """Write six files with times of three zones; return views, and whether one led to a purchase.

    A purchase comes half an hour after its view.
    """
    users, items, drawn = log
    (folder / "events.yaml").write_text(EVENTS)
    views = dict[tuple[str, str, int], bool]()
    rows: dict[str, list[list[Any]]] = {}
    for number, (user, item, hour, is_bought, price) in enumerate(drawn):
        name = list(ZONES)[number % 3]
        moment = START + (hour + 4 * number) % HOURS * HOUR
        pair = users[(user + number) % 10], items[(item + number // 30) % 10]
        views[*pair, moment] = views.get((*pair, moment), False) or bool((is_bought + number) % 2)
        actions = {"view": moment} | (
            {"buy": moment + HOUR // 2} if (is_bought + number) % 2 else {}
        )
        for action, seconds in actions.items():
            ts = datetime.fromtimestamp(seconds, ZoneInfo(ZONES[name])).strftime(
                "%Y-%m-%d %H:%M:%S"
            )
            rows.setdefault(f"{name}-{number // 3 % 2}.csv", []).append([*pair, ts, action, price])
    for name, lines in rows.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([["customer", "sku", "at", "what", "price"], *lines])
    assert len(rows) == 6
    return views


def test_a_new_user_writes_few_lines() -> None:
    assert len(EVENTS.splitlines()) <= 25 and len(COMMANDS) + 2 <= 5


@pytest.mark.long
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(log=logs)
def test_five_commands_lead_from_files_to_a_served_answer(log: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        views = write_log(folder, log)
        for command in COMMANDS:
            process = run_recsys(*command.split(), folder=folder)
            assert process.returncode == 0, process.stderr
        server = ServedPackage(folder / "package", folder / "log")
        try:
            request = json.loads((folder / "package" / "request.json").read_text())
            request["candidates"] = log[1]
            response = server.call("/v1/rank", request)
        finally:
            assert server.end() == 0
        assert response.status == 200 and sorted(response.content["items"]) == sorted(log[1])
        scores = response.content["scores"]["bought"]
        assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()
        rows = pq.read_table(folder / "data" / "train").to_pylist()
        keys = [(row["user"], row["item"], row["time"] // 10**6) for row in rows]
        single = {key for key, count in Counter(keys).items() if count == 1}
        labels = {key: bool(row["bought"]) for key, row in zip(keys, rows, strict=True)}
        assert len(single) > 50 and labels.keys() <= views.keys()
        assert all(labels[key] == views[key] for key in single)
