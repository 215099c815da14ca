"""Rows with several items become a row for each, and `where` chooses rows."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events import file_columns
from recsys.data.events.prepare import prepare_events
from recsys.data.events.reader import selected_rows
from recsys.data.events.settings import EventTable, Several
from recsys.data.events.times import form_problem, to_micros
from recsys.storage.location import Location

FILE = Location.of("log.tsv")


def table(**settings: Any) -> EventTable:
    return EventTable(path="log.tsv", item="shown", **settings)


def rows(
    batch: pa.RecordBatch, event_table: EventTable, first_row: int = 0
) -> list[tuple[int, Any]]:
    result, positions = selected_rows(batch, event_table, FILE, first_row, {})
    return list(zip(positions.tolist(), result.to_pylist(), strict=True))


def test_each_item_of_a_text_becomes_a_row_with_its_number() -> None:
    batch = pa.record_batch(
        {"user": ["a", "b", "c", "d"], "shown": [" N-1-1 N2-0", "", None, "7-2.5"]}
    )
    split = rows(batch, table(several=Several(column="clicked")), first_row=10)
    assert split == [
        (10 << 12, {"user": "a", "shown": "N-1", "clicked": 1.0}),
        (10 << 12 | 1, {"user": "a", "shown": "N2", "clicked": 0.0}),
        (11 << 12, {"user": "b", "shown": None, "clicked": None}),
        (12 << 12, {"user": "c", "shown": None, "clicked": None}),
        (13 << 12, {"user": "d", "shown": "7", "clicked": 2.5}),
    ]
    lists = pa.record_batch({"shown": [[3, 4], [5]]})
    split = rows(lists, table(several=Several()))
    assert split == [(0, {"shown": 3}), (1, {"shown": 4}), (1 << 12, {"shown": 5})]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"kind": "x"}, [0, 2]),
        ({"kind": ["x", "y"], "number": 1}, [0, 1]),
        ({"number": 9}, []),
        ({"ok": True}, [0, 2]),
        ({"ok": 1}, [0, 2]),
        ({"ok": [0, 1]}, [0, 1, 2]),
        ({"none": 1}, []),
    ],
)
def test_where_chooses_rows_of_all_its_columns(condition: Any, expected: list[int]) -> None:
    columns = {"kind": ["x", "y", "x", None], "number": [1, 1, 2, 1]}
    batch = pa.record_batch(columns | {"ok": [True, False, True, None], "none": pa.nulls(4)})
    assert [position for position, _ in rows(batch, table(where=condition))] == expected


@pytest.mark.parametrize(
    ("folder", "values", "is_chosen"),
    [
        ("2026-01-02", "2026-01-02", True),
        ("2026-01-02", ["2026-01-01", "2026-01-03"], False),
        ("07", 7, True),
        (None, "x", False),
    ],
)
def test_where_chooses_files_by_the_names_of_their_folders(
    folder: str | None, values: Any, is_chosen: bool
) -> None:
    batch = pa.record_batch({"shown": [1, 2]})
    selected, _ = selected_rows(batch, table(where={"part": values}), FILE, 0, {"part": folder})
    assert selected.num_rows == (2 if is_chosen else 0)


@pytest.mark.parametrize(
    ("shown", "settings", "texts"),
    [
        (["a-1 b"], {"several": Several(column="clicked")}, ["'shown'", "row 0", "'b'"]),
        ([" ".join("a" * 4097)], {"several": Several()}, ["'shown'", "4096"]),
        ([3], {"where": {"shown": "many"}}, ["'shown'", "int64", "many"]),
    ],
)
def test_other_values_are_refused_by_file_and_column(
    shown: list[Any], settings: dict[str, Any], texts: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        selected_rows(pa.record_batch({"shown": shown}), table(**settings), FILE, 0, {})
    for text in ["log.tsv", *texts]:
        assert text in str(caught.value)


def test_times_of_another_form_are_read_in_their_zone_and_others_named() -> None:
    form = "%m/%d/%Y %I:%M:%S %p"
    times = pa.array(["11/9/2019 9:05:58 PM", None])
    expected = [1_573_329_958_000_000, None]  # 20:05:58 in UTC
    assert to_micros(times, "s", "Europe/Berlin", form).to_pylist() == expected
    zoned, offset = pa.array(["11/9/2019 21:05 +0300"]), "%m/%d/%Y %H:%M %z"
    assert to_micros(zoned, "s", "Europe/Berlin", offset).to_pylist() == [1_573_322_700_000_000]
    with pytest.raises(ValueError, match=r"row 1: '2/30/2019 21:05 Z'"):  # not March 2
        to_micros(pa.array(["1/30/2019 21:05 -05:30", "2/30/2019 21:05 Z"]), "s", "UTC", offset)
    with pytest.raises(ValueError, match=r"row 1: '2019-11-09' .*%I"):
        to_micros(pa.array(["11/9/2019 9:05:58 PM", "2019-11-09"]), "s", "UTC", form)
    with pytest.raises(ValueError, match=r"row 1: '2/30/2019 9:05:58 PM'"):  # not March 2
        to_micros(pa.array(["1/30/2019 9:05:58 PM", "2/30/2019 9:05:58 PM"]), "s", "UTC", form)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("%Y-%m-%d %z %H:%M", "2026-02-{} +0100 05:00"),
        ("%z%%%d-%m-%Y %H:%M", "+0100%{}-02-2026 05:00"),
        ("%d-%m-%Y\t%H:%M%z\\", "{}-02-2026  05:00 +01:00\\"),
        ("%F%z\\1%R", "2026-02-{}+01\\105:00"),
    ],
)
def test_an_offset_may_be_anywhere_in_a_time(form: str, text: str) -> None:
    expected = datetime(2026, 2, 28, 4, tzinfo=UTC).timestamp() * 10**6
    assert to_micros(pa.array([text.format(28)]), "s", "UTC", form).to_pylist() == [expected]
    with pytest.raises(ValueError, match=r"row 0: .* is no time"):  # not March 3
        to_micros(pa.array([text.format(31)]), "s", "UTC", form)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ("%Y-%m-%d %H:%M:%S", None),
        ("%d/%b/%y:%H:%M:%S %z", None),
        ("%Y%j", None),
        ("100%% %D %T", None),
        ("%Y-%m-%d %Z", "set time_zone"),
        ("%H:%M", "no year"),
        ("%G-W%V-%u", "no year"),  # read as 1900
    ],
)
def test_a_form_of_times_has_a_date_and_no_name_of_a_zone(form: str, problem: str | None) -> None:
    assert (problem or "None") in str(form_problem(form))


@pytest.mark.parametrize(
    ("form", "ending"), [("%Y%m%d", "csv"), ("%Y-%d-%m", "csv"), ("%d%m%Y", "")]
)
def test_times_of_a_form_are_no_other_times_though_they_look_like_them(
    tmp_path: Path, form: str, ending: str
) -> None:
    days = [datetime(2026, 5, day, tzinfo=UTC) for day in range(1, 11)]
    texts = [day.strftime(form) for day in days]
    if ending:
        lines = ["item,user,time", *(f"1,1,{text}" for text in texts)]
        (tmp_path / "log.csv").write_text("\n".join(lines))
    else:  # the value of a folder
        for text in texts:
            (tmp_path / f"log.csv/time={text}").mkdir(parents=True)
            (tmp_path / f"log.csv/time={text}/a.csv").write_text("item,user\n1,1\n")
    view = {"path": "log.csv", "time_format": form}
    content = {"events": {"view": view}, "labels": {"viewed": {"action": "view"}}}
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
    prepare_events(tmp_path / "events.yaml", tmp_path / "out")
    tables = (pq.read_table(tmp_path / "out" / split) for split in ("train", "valid", "test"))
    times = [time for split_rows in tables for time in split_rows["time"].to_pylist()]
    assert times == [day.timestamp() * 10**6 for day in days]


@pytest.mark.parametrize(("column", "value"), [("time", "2026-02-30"), ("price", 1e39)])
def test_a_value_is_named_by_its_row_of_the_file(tmp_path: Path, column: str, value: Any) -> None:
    log = {"item": [0, 1] * 10, "user": [1] * 20, "time": ["2026-05-01"] * 20, "price": [1.0] * 20}
    log[column][13] = value
    pq.write_table(pa.table(log), tmp_path / "log.parquet", row_group_size=4)
    view = {"path": "log.parquet", "columns": ["price"], "where": {"item": 1}}
    content = {"events": {"view": view}, "labels": {"dear": {"column": "price", "at_least": 1}}}
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f"log.parquet: column '{column}': row 13: "):
        prepare_events(tmp_path / "events.yaml", tmp_path / "out")


def test_text_files_may_have_the_first_value_or_fraction_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_columns, "BLOCK", 128)
    seconds = [*range(20), *(second + 0.5 for second in range(20, 40))]
    times = [str(datetime.fromtimestamp(second, UTC).replace(tzinfo=None)) for second in seconds]
    lines = [f"1,1,{time},{'' if index < 30 else 'b'}" for index, time in enumerate(times)]
    (tmp_path / "log.csv").write_text("\n".join(["item,user,time,arm", *lines, ""]))
    for arms, late in ((None, seconds), ("b", seconds[30:])):
        view = {"path": "log.csv", "where": {} if arms is None else {"arm": arms}}
        content = {"events": {"view": view}, "labels": {"viewed": {"action": "view"}}}
        (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
        out = tmp_path / f"out {arms}"
        prepare_events(tmp_path / "events.yaml", out)
        tables = (pq.read_table(out / split) for split in ("train", "valid", "test"))
        assert [time / 1e6 for data in tables for time in data["time"].to_pylist()] == late


def test_integers_beside_a_form_of_digits_alone_are_refused() -> None:
    assert to_micros(pa.array([60]), "s", "UTC", "%Y-%m-%d").to_pylist() == [60_000_000]
    with pytest.raises(ValueError, match=r"int64.*'%Y%m%d'.*as text"):
        to_micros(pa.array([20261101]), "s", "UTC", "%Y%m%d")


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (["7", "0", "-3"], pa.int64()),
        (["007", "7", "12"], pa.string()),
        (["0x7", "7", "8"], pa.string()),
        (["12345678901234567890", "7", "8"], pa.string()),
    ],
)
def test_ids_of_text_files_are_integers_only_where_no_two_of_them_become_one(
    tmp_path: Path, ids: list[str], kind: pa.DataType
) -> None:
    lines = [f"{ids[n % 3]},{n % 4},{1_790_000_000 + n}" for n in range(40)]
    (tmp_path / "log.csv").write_text("\n".join(["item,user,time", *lines]))
    content = {"events": {"view": {"path": "log.csv"}}, "labels": {"viewed": {"action": "view"}}}
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
    prepare_events(tmp_path / "events.yaml", tmp_path / "out")
    items = pq.read_table(tmp_path / "out" / "train")["item"]
    assert items.type == kind
    assert {str(item) for item in items.to_pylist()} == set(ids)


@pytest.mark.parametrize("value", ["007", "7.5", "x"])
def test_a_later_id_of_another_form_is_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.csv").write_text("item,user,time\n7,1,1790000000\n")
    (tmp_path / "b.csv").write_text(f"item,user,time\n{value},1,1790000000\n")
    path = ["a.csv", "b.csv"]
    content = {"events": {"view": {"path": path}}, "labels": {"viewed": {"action": "view"}}}
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f"b.csv.*'item'.*'{value}'"):
        prepare_events(tmp_path / "events.yaml", tmp_path / "out")
