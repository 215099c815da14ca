"""What arrives after a row's moment changes nothing of the row but its labels."""

import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from recsys.data.events.history_values import MOMENT
from recsys.data.events.load import load_events_config
from recsys.data.events.prepare import make_samples
from recsys.data.events.sql import DuckDBEngine, SqlEngine
from tests.recsys.data.events import logs
from tests.recsys.data.events.logs import HOUR, HOURS, Row

OpenEngine = Callable[[Path], SqlEngine]
DRAWN = 2
ONCE = settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def config(delay: str, **options: Any) -> Row:
    counts = {
        "item": {"of": "item"},
        "rate": {"of": "user", "actions": "buy", "per": "view"},
        "brand": {"of": ["user", "brand"]},
    }
    return {
        "labels": {
            "bought": {"action": "buy"},
            "buys_later": {"action": "buy", "within": "2h"},
        },
        "unripe": "keep",
        "items": {"columns": {"brand": {"kind": "id"}}},
        "drop": {"later_than": "2030-01-01", "max_events_per_user": 25},
        "histories": {
            "past": {
                "length": 4,
                "delay": delay,
                "parallel": {"past_age": "age", "past_brand": "brand"},
            }
        },
        "counts": {
            f"count_{name}": {**count, "within": "9h", "delay": delay}
            for name, count in counts.items()
        },
        # All rows but the last hours' are in train: no quantile moves with later events.
        "split": {"by": "dates", "at": [iso(HOURS[20]), iso(HOURS[25])]},
        **options,
    }


def iso(micros: int) -> str:
    return f"{np.datetime64(micros, 'us')}+00:00"


CASES: dict[str, tuple[str, Row]] = {
    "no delay": ("0s", {"negatives": {"per_positive": DRAWN}}),
    "delay": ("3h", {"negatives": {"per_positive": DRAWN, "by": "popularity"}}),
    "each row a sample": ("0s", {"attribute": "all"}),
}


@pytest.mark.parametrize("case", CASES)
@ONCE
@given(data=st.data())
def test_what_arrives_later_changes_no_row_but_its_labels(case: str, data: st.DataObject) -> None:
    compare(DuckDBEngine, case, data)


@pytest.mark.long
@settings(ONCE, max_examples=2)
@given(data=st.data())
def test_on_spark_what_arrives_later_changes_no_row_but_its_labels(
    open_spark: OpenEngine, data: st.DataObject
) -> None:
    compare(open_spark, "delay", data)


def compare(open_engine: OpenEngine, case: str, data: st.DataObject) -> None:
    log = data.draw(logs.events(["view", "buy"]))
    items = data.draw(logs.snapshots(st.integers(0, 5)))
    other_log = data.draw(logs.events(["view", "buy"]))
    moment = data.draw(st.sampled_from(HOURS[8:25]))
    arrived = [row for row in log if max(row["arrived"], row["ts"]) <= moment]
    later = [row for row in log if row not in arrived]
    changed = [row for row in other_log if max(row["arrived"], row["ts"]) > moment]
    delay, options = CASES[case]
    old, new = (
        samples(open_engine, [*arrived, *events], items, config(delay, **options))
        for events in (later, changed)
    )
    held_out = {key for key in old if key[3] == 2}
    for samples_read in (old, new):
        for key in [k for k in samples_read if k[2] > moment or k[4] >= len(arrived)]:
            del samples_read[key]
    # Draws of valid and test may change by later positives of that split; those of train may not.
    assert {k for k in old if k[3] < 2} == {k for k in new if k[3] < 2}
    common = old.keys() & new.keys()
    assume(common)
    assert {key: old[key] for key in common} == {key: new[key] for key in common}
    assert all(key in common for key in old if key not in held_out)


def samples(open_engine: OpenEngine, log: list[Row], items: list[Row], content: Row) -> Any:
    """Samples without labels by user, item, time, `drawn_as`, and position of the log's row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = logs.write_events(folder, "log", log, "us", files=1)
        table |= {"action": "type", "arrived": "arrived"}
        file = logs.write_snapshots(folder, "items", items, pa.int64())
        content = {**content, "events": {"log": table}, "items": {**file, **content["items"]}}
        (folder / "events.yaml").write_text(yaml.safe_dump(content))
        rows = read_samples(open_engine, folder)
    by_key = {}
    for row in rows:
        drawn_as = row.get("drawn_as", 0)
        position = row.pop("position")
        position_index = position if position >= 0 else (-position - 1) // 2 // DRAWN
        values = {name: value for name, value in row.items() if not name.startswith("l_")}
        by_key[(row["uid"], row["iid"], row["ts"], drawn_as, position_index)] = values
    return by_key


def read_samples(open_engine: OpenEngine, folder: Path) -> list[Row]:
    """All samples of `events.yaml` in a folder, with their histories."""
    with closing(open_engine(folder / "stages")) as engine:
        writer, _ = make_samples(engine, load_events_config(folder / "events.yaml"))
        table = engine.table(f'SELECT *, ts AS "{MOMENT}" FROM complete')
        if writer.files is None:
            return list(table.drop(MOMENT).to_pylist())
        names = [name for name in table.schema.names if "/" not in name]
        batches = table.combine_chunks().to_batches()
        tables = [writer.files.with_lists(batch, [*names, *writer.lists]) for batch in batches]
        return list(pa.Table.from_batches(tables).to_pylist())


@pytest.mark.parametrize("name", ["ifdb", "retail"])
def test_in_logs_of_people_what_comes_later_changes_no_row(name: str, tmp_path: Path) -> None:
    """A fifth of the users, with ties in time, repeats, and items that come later."""
    log = logs.log_of_people(name, 150)
    moment = log["time"][int(0.7 * len(log))].as_py()
    arrived = log.filter(pc.less_equal(log["time"], moment))
    later = log.filter(pc.greater(log["time"], moment))
    random = np.random.default_rng(0)
    changed = later.take(random.permutation(len(later))[: len(later) // 2])
    changed = changed.set_column(1, "item", later["item"].take(random.permutation(len(changed))))
    # In the order of time, so that a sample's position names the same row in both logs.
    samples_read = []
    for number, events in enumerate((later, changed)):
        log_folder = tmp_path / str(number)
        log_folder.mkdir()
        pq.write_table(pa.concat_tables([arrived, events]), log_folder / "log.parquet")
        content = {
            "events": {"play": {"path": "log.parquet"}},
            "labels": {"played": {"action": "play"}},
            "negatives": {"per_positive": DRAWN, "by": "popularity"},
            "histories": {"past": {"length": 20, "parallel": {"past_age": "age"}}},
            "counts": {"plays": {"of": "item"}, "plays_of_month": {"of": "item", "within": "30d"}},
            "split": {"by": "dates", "at": [iso(moment * 10**6 + 1), iso(moment * 10**6 + HOUR)]},
        }
        (log_folder / "events.yaml").write_text(yaml.safe_dump(content))
        rows = read_samples(DuckDBEngine, log_folder)
        rows = [row for row in rows if row["ts"] <= moment * 10**6]
        samples_read.append(sorted(rows, key=lambda row: (row["position"], row["iid"])))
    assert len(samples_read[0]) > 2 * len(arrived)
    assert samples_read[0] == samples_read[1]
