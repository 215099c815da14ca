"""Rows with several items become a row for each, and `where` chooses rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.events.reader import selected_rows
from recsys.data.events.settings import EventTable, Several
from recsys.data.events.times import to_micros
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


@pytest.mark.parametrize(
    ("text", "between", "items"),
    [
        ("N1  N2\n N3", " ", ["N1", "N2", "N3"]),
        (" \t", " ", [None]),
        ("a b | c|d ", "|", ["a b", "c", "d"]),
    ],
)
def test_any_white_space_is_as_good_as_a_blank_and_is_no_part_of_an_item(
    text: str, between: str, items: list[str | None]
) -> None:
    batch = pa.record_batch({"shown": [text]})
    split = rows(batch, table(several=Several(between=between)))
    assert [row["shown"] for _, row in split] == items


@pytest.mark.parametrize(
    ("where", "expected"),
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
def test_where_chooses_rows_of_all_its_columns(where: Any, expected: list[int]) -> None:
    columns = {"kind": ["x", "y", "x", None], "number": [1, 1, 2, 1]}
    batch = pa.record_batch(columns | {"ok": [True, False, True, None], "none": pa.nulls(4)})
    assert [position for position, _ in rows(batch, table(where=where))] == expected


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


def write_log(folder: Path, day: str) -> Path:
    """Views in two folders, of which those of a day are impressions, beside purchases."""
    log: dict[str, Any] = {
        "user": [number % 4 for number in range(60)],
        "item": [number % 7 for number in range(60)],
        "time": [1_790_000_000 + number for number in range(60)],
    }
    for part in ("day=2026-01-01", "day=2026-01-02"):
        (folder / "views" / part).mkdir(parents=True)
        pq.write_table(pa.table(log), folder / "views" / part / "a.parquet")
    pq.write_table(pa.table(log), folder / "buys.parquet")
    (folder / "events.yaml").write_text(
        "events: {view: {path: views}, buy: {path: buys.parquet}}\n"
        f"impressions: {{path: views, where: {{day: {day}}}}}\n"
        "labels: {bought: {action: buy, within: 1d}}\nunripe: keep\nembargo: false\n"
    )
    return folder / "events.yaml"


def test_a_folder_is_chosen_by_a_date_as_yaml_reads_it(tmp_path: Path) -> None:
    report = prepare_events(write_log(tmp_path, "2026-01-02"), tmp_path / "out")
    assert report["events"] == 60 + 120 + 60


def test_a_where_that_chooses_no_row_of_a_table_is_named(tmp_path: Path) -> None:
    config = write_log(tmp_path, "2026-01-09")
    with pytest.raises(ValueError, match=r"views/day=2026-01-01/a\.parquet: .*'impression'.*-09"):
        prepare_events(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("shown", "settings", "words"),
    [
        (["a-1 b"], {"several": Several(column="clicked")}, ["'shown'", "row 0", "'b'"]),
        ([3], {"several": Several()}, ["'shown'", "int64"]),
        ([" ".join("a" * 4097)], {"several": Several()}, ["'shown'", "4096"]),
        (["a-1 -0"], {"several": Several(column="clicked")}, ["'shown'", "row 0", "'-0'"]),
        ([3], {"where": {"shown": "many"}}, ["'shown'", "int64", "many"]),
        ([True], {"where": {"shown": 2}}, ["'shown'", "bool", "[2]"]),
        ([3], {"where": {"shown": 2**70}}, ["'shown'", str(2**70)]),
    ],
)
def test_other_values_are_refused_by_file_and_column(
    shown: list[Any], settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        selected_rows(pa.record_batch({"shown": shown}), table(**settings), FILE, 0, {})
    for word in ["log.tsv", *words]:
        assert word in str(caught.value)


def test_times_of_another_form_are_read_in_their_zone_and_others_named() -> None:
    form = "%m/%d/%Y %I:%M:%S %p"
    times = pa.array(["11/9/2019 9:05:58 PM", None])
    expected = [1_573_329_958_000_000, None]  # 20:05:58 in UTC
    assert to_micros(times, "s", "Europe/Berlin", form).to_pylist() == expected
    with pytest.raises(ValueError, match=r"row 1: '2019-11-09' .*%I"):
        to_micros(pa.array(["11/9/2019 9:05:58 PM", "2019-11-09"]), "s", "UTC", form)


def test_rows_of_lists_of_integers_make_the_samples_of_rows_of_one_item(tmp_path: Path) -> None:
    users, times = [n % 4 for n in range(40)], [1_790_000_000 + n for n in range(40)]
    lists = [[n % 7, 7 + n % 3] for n in range(40)]
    wide = pa.table({"user": users, "time": times, "item": lists})
    flat = pa.table(
        {
            "user": [user for user in users for _ in range(2)],
            "time": [time for time in times for _ in range(2)],
            "item": [item for items in lists for item in items],
        }
    )
    tables = {}
    for name, log in {"wide": wide, "flat": flat}.items():
        pq.write_table(log, tmp_path / f"{name}.parquet", row_group_size=9)
        content = {
            "events": {"view": {"path": f"{name}.parquet"}},
            "labels": {"viewed": {"action": "view"}},
            "histories": {"past": {"length": 5}},
        }
        if name == "wide":
            content["events"]["view"]["several"] = {}
        (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
        prepare_events(tmp_path / "events.yaml", tmp_path / f"out_{name}")
        tables[name] = [
            pq.read_table(tmp_path / f"out_{name}" / part) for part in ("train", "test")
        ]
    assert tables["wide"] == tables["flat"]


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


@pytest.mark.parametrize(("letter", "kind"), [("", pa.int64()), ("N", pa.string())])
def test_ids_split_from_texts_have_the_type_of_ids_alone(
    tmp_path: Path, letter: str, kind: pa.DataType
) -> None:
    lines = [
        f"{letter}{n % 5}-1 {letter}{n % 3}-0\t{n % 4}\t{1_790_000_000 + n}" for n in range(40)
    ]
    (tmp_path / "log.tsv").write_text("\n".join(["item\tuser\ttime", *lines]))
    (tmp_path / "items.csv").write_text(
        "\n".join(["id,name", *(f"{letter}{item},x" for item in range(5))])
    )
    content = {
        "events": {"view": {"path": "log.tsv", "several": {"column": "seen"}, "columns": ["seen"]}},
        "items": {"path": "items.csv", "content": {"name": "text"}},
        "labels": {"seen_at_all": {"column": "seen"}},
    }
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
    prepare_events(tmp_path / "events.yaml", tmp_path / "out")
    items = pq.read_table(tmp_path / "out" / "train")["item"]
    assert items.type == kind
    assert {str(item) for item in items.to_pylist()} == {f"{letter}{n}" for n in range(5)}


@pytest.mark.parametrize("value", ["007", "7.5", "x"])
def test_a_later_id_of_another_form_is_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.csv").write_text("item,user,time\n7,1,1790000000\n")
    (tmp_path / "b.csv").write_text(f"item,user,time\n{value},1,1790000000\n")
    path = ["a.csv", "b.csv"]
    content = {"events": {"view": {"path": path}}, "labels": {"viewed": {"action": "view"}}}
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f"b.csv.*'item'.*'{value}'"):
        prepare_events(tmp_path / "events.yaml", tmp_path / "out")
