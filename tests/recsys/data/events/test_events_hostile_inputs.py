"""Logs as they come: odd types, folders, links, names and texts keep their meaning or are named."""

import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.events.times import to_micros

START = 1_790_000_000
ROWS = range(40)
Row = dict[str, Any]


def log(**columns: Any) -> pa.Table:
    table = {
        "user": [f"u{row % 4}" for row in ROWS],
        "item": [row % 7 for row in ROWS],
        "time": [START + row for row in ROWS],
        "type": ["view", "buy"] * 20,
        "price": [1.5] * 40,
    }
    return pa.table(table | columns)


def prepare(
    folder: Path, path: str = "log.parquet", table: Row | None = None, **settings: Any
) -> list[Row]:
    """The samples, in the order of the files; `table` are settings of the log's table."""
    content: Row = {
        "events": {"log": {"path": path, "action": "type", "columns": ["price"], **(table or {})}},
        "labels": {"bought": {"action": "buy"}},
        "context": {"price": {"kind": "dense", "fill": 0}},
        **settings,
    }
    (folder / "events.yaml").write_text(yaml.safe_dump(content))
    prepare_events(folder / "events.yaml", folder / "data")
    return [
        row
        for split in ("train", "valid", "test")
        for row in pq.read_table(folder / "data" / split).to_pylist()
    ]


def write_files(folder: Path, *tables: tuple[str, pa.Table]) -> None:
    """Write tables as files in `log/`."""
    for name, table in tables:
        file = folder / "log" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)


def halves(table: pa.Table) -> list[pa.Table]:
    return [table.slice(0, 20), table.slice(20)]


SHOP = {"columns": ["price", "shop"]}


@pytest.mark.parametrize(
    ("folders", "kind", "values"),
    [
        (["shop=7", "shop=12"], "id", [7, 12]),
        (["shop=007", "shop=7"], "id", ["007", "7"]),
        (["shop=1", "shop=x"], "id", ["1", "x"]),
        (["shop=__HIVE_DEFAULT_PARTITION__", "shop=x"], "id", [None, "x"]),
        (["shop=New%20York", "shop=a%2Fb"], "id", ["New York", "a/b"]),
        (["shop=1.5", "shop=2"], "dense", [1.5, 2.0]),
    ],
)
def test_values_of_folders_are_those_that_hive_wrote(
    folders: list[str], kind: str, values: list[Any], tmp_path: Path
) -> None:
    first, second = halves(log())
    write_files(tmp_path, (f"{folders[0]}/a.parquet", first), (f"{folders[1]}/b.parquet", second))
    rows = prepare(tmp_path, "log", table=SHOP, context={"shop": kind})
    assert [row["shop"] for row in rows] == [value for value in values for _ in range(20)]


@pytest.mark.parametrize("column", ["item", "price"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_file_without_any_value_of_a_column_leaves_its_type_to_the_others(
    column: str, number: int, tmp_path: Path
) -> None:
    files = halves(log())
    index = files[number].schema.get_field_index(column)
    files[number] = files[number].set_column(index, column, pa.nulls(20))
    empty = pa.table({name: pa.nulls(0) for name in log().column_names})
    write_files(
        tmp_path, ("0.parquet", empty), *((f"{n + 1}.parquet", f) for n, f in enumerate(files))
    )
    rows = prepare(tmp_path, "log", split={"at": [0.5, 0.7]})
    assert len(rows) == (20 if column == "item" else 40)
    assert {type(row["item"]) for row in rows} == {int}


def linked_in_a_circle(folder: Path) -> None:
    (folder / "log" / "again").symlink_to(folder / "log")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "log" / "b.parquet")


def write(name: str) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(log(), folder / "log" / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write("b.PARQUET"), "b.PARQUET"),
        (write("b.csv.bz2"), "b.csv.bz2"),
        (linked_in_a_circle, "again"),
        (pipe, "b.parquet"),
    ],
)
def test_files_that_would_be_left_out_or_never_end_are_named(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_files(tmp_path, ("a.parquet", log()))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, "log")


def test_texts_such_as_na_are_values_of_text_files_and_empty_ids_are_none(tmp_path: Path) -> None:
    ids = ["NA", "null", "N/A", "\\N", "", "nan"]
    lines = [f"{ids[row % 6]},{row % 7},{START + row},0{row // 2 % 2},1\n" for row in ROWS]
    (tmp_path / "log.csv").write_text("user,item,time,type,price\n" + "".join(lines))
    rows = prepare(tmp_path, "log.csv", labels={"bought": {"action": "01"}})
    assert [row["user"] for row in rows] == ["NA", "N/A"] * 7
    pq.write_table(log(user=["", "u1", None, "u2"] * 10), tmp_path / "log.parquet")
    (tmp_path / "data").rename(tmp_path / "before")
    assert {row["user"] for row in prepare(tmp_path)} == {"u1", "u2"}


def test_titles_of_text_files_are_texts_though_they_look_like_numbers(tmp_path: Path) -> None:
    pq.write_table(log(), tmp_path / "log.parquet")
    titles = ["1917", "300", '"NA\nand ""more"""', "", "7.50", "x", "true"]
    lines = [f"{item},{title}\n" for item, title in enumerate(titles)]
    (tmp_path / "items.csv").write_text("id,title\n" + "".join(lines))
    prepare(tmp_path, items={"path": "items.csv", "content": {"title": "text"}})
    titles_read = pq.read_table(tmp_path / "data" / "items")["title"].to_pylist()
    assert titles_read == ["1917", "300", 'NA\nand "more"', None, "7.50", "x", "true"]


def test_numbers_and_truth_values_are_actions_and_values_of_rows(tmp_path: Path) -> None:
    clicked = pa.array([row < 36 for row in ROWS])
    shop = pa.array(["a", "b"] * 20).dictionary_encode()
    kinds = pa.array([row // 2 % 2 for row in ROWS])
    user = pa.array([f"u{row % 4}" for row in ROWS]).cast(pa.string_view())
    pq.write_table(log(type=kinds, clicked=clicked, shop=shop, user=user), tmp_path / "log.parquet")
    settings = {"where": {"clicked": True, "shop": "a"}}
    rows = prepare(tmp_path, table=settings, labels={"bought": {"action": 1}})
    assert [row["bought"] for row in rows] == [0.0, 1.0] * 9


def test_columns_of_any_name_keep_their_values_and_the_order_of_rows(tmp_path: Path) -> None:
    names = ["position", "ts", "iid", "{0} %s", 'p"; DROP TABLE x; --']
    columns = {name: [float(-row) for row in ROWS] for name in names}
    pq.write_table(log(**columns), tmp_path / "log.parquet")
    context, negatives = dict.fromkeys(names, "dense"), {"per_positive": 2}
    rows = prepare(tmp_path, table={"columns": names}, context=context, negatives=negatives)
    for name in names:
        assert [row[name] for row in rows if not row["sampled"]] == columns[name]


@pytest.mark.parametrize("name", ["uid=7", "action=buy", "o'brien"])
def test_names_of_folders_above_the_output_are_no_values(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for folder in (tmp_path, tmp_path / name):
        pq.write_table(log(), folder / "log.parquet")
    settings: Row = {"drop": {"duplicates": False}, "counts": {"views": {"of": "item"}}}
    assert prepare(tmp_path / name, **settings) == prepare(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"context": {"price": "dense", "Price": "dense"}}, "'Price' and 'price'"),
        ({"histories": {"past": {"parallel": {"past_age": "age"}}}}, "'age'"),
    ],
)
def test_names_that_mean_two_columns_are_refused(settings: Row, text: str, tmp_path: Path) -> None:
    columns = ["price", "Price", "age"]
    pq.write_table(log(Price=[2.5] * 40, age=[33.0] * 40), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=text):
        prepare(tmp_path, table={"columns": columns}, **settings)


def test_a_file_is_read_once(tmp_path: Path) -> None:
    write_files(tmp_path, ("a.parquet", log()))
    with pytest.raises(ValueError, match=r"a\.parquet.*twice"):
        prepare(tmp_path, table={"path": ["log", "log/a.parquet"]})


def test_times_of_databases_and_clocks() -> None:
    texts = ["2026-01-01 00:00:00+01", "2026-01-01 00:00", "2026-01-01", "2026-01-01T00:00:01.5-05"]
    seconds = [micros / 10**6 for micros in to_micros(pa.array(texts), "s", "UTC").to_pylist()]
    assert seconds == [1767222000, 1767225600, 1767225600, 1767243601.5]
    gap = pa.array(
        [datetime(2026, 3, 29, 1, 59) + timedelta(minutes=minute) for minute in range(2)]
    )
    with pytest.raises(ValueError, match=r"02:00:00.*time_zone"):
        to_micros(gap, "s", "Europe/Berlin")
