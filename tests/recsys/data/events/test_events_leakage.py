"""What happens at or after a sample's moment, or within the delay before it, never changes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from recsys.data.events.engines.on_duckdb import DuckDBEngine
from recsys.data.events.history_values import MOMENT
from recsys.data.events.load import load_events_config
from recsys.data.events.prepare import make_samples
from tests.recsys.data.events import logs
from tests.recsys.data.events.logs import HOUR, Row


def config(delay: str) -> Row:
    past: Row = {"delay": delay}
    counts = {"item": {"of": "item"}, "rate": {"of": "user", "actions": "buy", "per": "view"}}
    return {
        "labels": {"bought": {"action": "buy"}},
        "drop": {"later_than": "2030-01-01"},
        "histories": {"past": {"length": 4, "parallel": {"past_age": "age"}, **past}},
        "counts": {f"count_{name}": {**of, "within": "9h", **past} for name, of in counts.items()},
    }


@pytest.mark.parametrize("delay", ["0s", "3h"])
@settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_later_events_do_not_change_earlier_samples(delay: str, data: st.DataObject) -> None:
    log = data.draw(logs.signals(["view", "buy"]))
    moment = data.draw(st.sampled_from([row["ts"] for row in log if usable(row)]))
    cut = moment - int(delay[0]) * HOUR
    others = data.draw(logs.signals(["view", "buy"]))
    own = next(row for row in log if row["ts"] == moment and usable(row))
    changed = [row for row in log if row["ts"] < cut] + [own]
    changed += [row for row in others if row["ts"] >= cut]
    before, after = samples(log, delay), samples(changed, delay)
    same = [key for key in before if key in after and key[2] <= moment]
    assert any(key[2] == moment for key in same)
    assert {key: before[key] for key in same} == {key: after[key] for key in same}


def samples(log: list[Row], delay: str) -> dict[Any, Row]:
    """Samples of a log by user, item, time and label."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = logs.write_events(folder, "log", log, "us")
        content = {**config(delay), "events": {"log": {**table, "action": "type"}}}
        (folder / "events.yaml").write_text(yaml.safe_dump(content))
        engine = DuckDBEngine(folder / "stages")
        try:
            made = make_samples(engine, load_events_config(folder / "events.yaml"))
            assert made.files is not None
            table = engine.table(f'SELECT *, ts AS "{MOMENT}" FROM complete').drop("position")
            names = [name for name in table.schema.names if "/" not in name]
            batches = table.combine_chunks().to_batches()
            parts = [made.files.with_lists(batch, [*names, *made.lists]) for batch in batches]
            rows = pa.Table.from_batches(parts).to_pylist()
        finally:
            engine.close()
    return {tuple(row[key] for key in ("uid", "iid", "ts", "l_bought")): row for row in rows}


def usable(row: Row) -> bool:
    return row["uid"] is not None and row["iid"] is not None
