"""What `explain-data` says of a dataset, against the same numbers by hand and by pandas."""

import json
import shutil
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.diagnostics.dataset.findings import explain_data, find
from recsys.diagnostics.dataset.summary import (
    GROUPS,
    PAIRS,
    ROWS,
    summarize_dataset,
)
from tests.datasets import item_rows, png, write_dataset, write_parquet
from tests.recsys.data import bad_impressions
from tests.recsys.data.parquet import bad_files
from tests.recsys.weighted_data import table_of, write_weighted

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("explain") / "data", num_items=40)


def frame(data: Path, split: str) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(file) for file in sorted((data / split).glob("*.parquet"))])


def change(data: Path, split: str, **columns: Any) -> Path:
    """Replaces columns of a split, or adds some, in one file."""
    table = pa.concat_tables([pq.read_table(f) for f in sorted((data / split).glob("*.parquet"))])
    for file in (data / split).glob("*.parquet"):
        file.unlink()
    for name, values in columns.items():
        array = values(table) if callable(values) else pa.array(values)
        index = table.schema.get_field_index(name)
        if index >= 0:
            table = table.set_column(index, name, array)
        else:
            table = table.append_column(name, array)
    return write_parquet(data / split / "part-0.parquet", table)


def findings(data: Path) -> str:
    return "\n".join(finding.what for finding in find(summarize_dataset(str(data))))


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_in_numbers(data: Path, split: str) -> None:
    summary = summarize_dataset(str(data)).splits[split]
    rows = frame(data, split)

    assert (summary.rows, summary.usable_rows, summary.bad_rows) == (len(rows), len(rows), [])
    assert summary.numbers["liked"]["mean"] == pytest.approx(rows["liked"].mean())
    price = summary.numbers["price"]
    for name, value in (("min", "min"), ("max", "max"), ("mean", "mean")):
        assert price[name] == pytest.approx(getattr(rows["price"], value)(), rel=1e-5)
    assert price["deviation"] == pytest.approx(rows["price"].std(ddof=0), rel=1e-4)
    lengths = rows["history"].map(lambda values: 0 if values is None else len(values))
    history = summary.lists["history"].summary()
    assert history["mean"] == pytest.approx(lengths.mean())
    assert history["p90"] == np.quantile(lengths, 0.9, method="inverted_cdf")
    assert history["max"] == lengths.max()
    assert history["empty_share"] == pytest.approx((lengths == 0).mean())
    assert summary.distinct[GROUPS] == rows["user"].nunique()
    assert summary.distinct[PAIRS] == len(rows.drop_duplicates(["user", "item"]))
    assert summary.distinct[ROWS] == len(rows.astype(str).drop_duplicates())
    counts = np.bincount(rows["item"], minlength=40)
    assert summary.item_counts.of(np.arange(40)).tolist() == counts.tolist()
    in_history = [
        row.item in list(row.history) for row in rows.itertuples() if row.history is not None
    ]
    assert summary.target_in_history == sum(in_history)


def test_shares_of_rows_that_training_knows_nothing_of(data: Path) -> None:
    shares = summarize_dataset(str(data)).splits["test"].shares
    train, test = frame(data, "train"), frame(data, "test")
    counts = train["item"].value_counts()
    train_rows = test["item"].map(counts).fillna(0)

    assert shares["unseen"] == pytest.approx((train_rows == 0).mean())
    assert shares["cold"] == pytest.approx((train_rows < 5).mean())
    assert shares["of_known_groups"] == pytest.approx(test["user"].isin(train["user"]).mean())
    assert shares["without_item_row"] == 0.0


def test_columns_whose_names_differ_in_case_alone_have_their_own_figures(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    schema = data / "schema.yaml"
    text = schema.read_text().replace("columns:\n", "columns:\n  Price: {kind: dense}\n", 1)
    schema.write_text(text)
    for split in SPLITS:
        rows = len(frame(data, split))
        change(data, split, Price=np.arange(rows, dtype=np.float32))

    numbers = summarize_dataset(str(data)).splits["test"].numbers
    assert numbers["Price"]["max"] == numbers["Price"]["count"] - 1
    assert numbers["price"]["max"] < 1


def test_rows_of_weight_0_count_for_no_item(tmp_path: Path) -> None:
    data, _ = write_weighted(tmp_path)
    splits = summarize_dataset(str(data)).splits
    rows = table_of(data, "train").to_pandas()
    counts = np.bincount(rows["item"][rows["times"] > 0], minlength=40)
    assert splits["train"].item_counts.of(np.arange(40)).tolist() == counts.tolist()
    test = table_of(data, "test").to_pandas()
    is_unseen = counts[test["item"][test["times"] > 0]] == 0
    assert splits["test"].shares["unseen"] == pytest.approx(is_unseen.mean())


def test_unknown_items_are_different_ones(tmp_path: Path) -> None:
    rows = {"user": [0, 0, 0, 1, 1], "item": [1, 8, 9, 1, 7], "y": [0, 1, 1, 0, 1]}
    rows["past"] = [[1], [9], [7], [2], []]
    for split in SPLITS:
        write_parquet(tmp_path / split / "part-0.parquet", pa.table(rows))
    (tmp_path / "vocabulary").mkdir()
    pq.write_table(pa.table({"id": [1, 2], "row": [0, 1]}), tmp_path / "vocabulary/item.parquet")
    (tmp_path / "schema.yaml").write_text(
        "{target_item: item, group: user, columns: {user: {kind: id, num_embeddings: 2}, item: "
        "{kind: id, num_embeddings: 3, vocabulary: {kind: exact}}, past: {kind: sequence, shares: "
        "item}, y: {kind: label}}}"
    )
    shares = summarize_dataset(str(tmp_path)).splits["test"].shares
    repeated = shares["repeated_pairs"], shares["repeated_rows"]
    assert (shares["target_in_history"], shares["of_top_items"]) == (1 / 5, 2 / 5)
    assert (repeated, shares["in_train"]) == ((0, 0), 2 / 5)


def test_rows_without_a_group_are_of_no_known_group(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    schema = data / "schema.yaml"
    kind = "num_embeddings: 10, vocabulary: {kind: hash}"
    schema.write_text(schema.read_text().replace("num_embeddings: 10", kind, 1))
    for split in ("train", "test"):  # at the same places of both
        users = [None if row % 5 == 0 else 3 for row in range(60 if split == "train" else 20)]
        change(data, split, user=pa.array(users, pa.int64()))

    test = summarize_dataset(str(data)).splits["test"]
    assert test.shares["of_known_groups"] == 16 / 20 and test.distinct[GROUPS] == 5


def test_content_of_the_items(data: Path) -> None:
    items = summarize_dataset(str(data)).items
    rows = pq.read_table(data / "items" / "part-0.parquet").to_pandas()
    assert items is not None and items.rows == 40

    text, poster, clip = (items.columns[name] for name in ("text", "poster", "clip"))
    assert (text.missing, poster.missing, clip.missing) == (2, 1, 1)  # see write_dataset
    assert text.lengths.summary()["max"] == rows["text"].dropna().str.len().max()
    assert (poster.opened, poster.broken) == (39, 0)
    assert clip.widths == {6: 39}


def test_items_without_impressions_and_impressions_without_items(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", num_items=40)
    change(data, "train", item=lambda table: pa.array(np.arange(table.num_rows) % 10))
    change(data, "valid", item=lambda table: pa.array(np.full(table.num_rows, 3)))
    change(data, "test", item=lambda table: pa.array(np.arange(table.num_rows) % 2))
    remaining = item_rows(40, np.random.default_rng(0)).filter(pa.compute.field("item") > 0)
    write_parquet(data / "items" / "part-0.parquet", remaining)
    summary = summarize_dataset(str(data))

    assert summary.items_without_rows() == 39 - 9  # of items 1 to 39
    assert summary.splits["test"].shares["without_item_row"] == 0.5
    assert "50.0% of " in findings(data)


@pytest.mark.parametrize(
    ("split", "columns", "message"),
    [
        ("train", {"liked": lambda t: pa.array([1.0] * len(t))}, "label 'liked' is 1 in all train"),
        ("train", {"price": lambda t: pa.array([2.0] * len(t))}, "'price' is 2 in all training"),
        ("train", {"price": lambda t: pa.array([1e5, *[0.0] * (len(t) - 1)])}, "0 to 100000"),
        (
            "test",
            {"item": lambda t: pa.array([39] * len(t))},
            "100.0% of the test rows are of i",
        ),
        (
            "test",
            {"user": lambda t: pa.array([9] * len(t))},
            "100.0% of the test rows have a 'user'",
        ),
        ("train", {"history": lambda t: as_history(t["item"], t)}, "have their own target"),
    ],
)
def test_findings(tmp_path: Path, split: str, columns: dict[str, Any], message: str) -> None:
    data = write_dataset(tmp_path / "data", num_items=40)
    for name, limit in (("user", 8), ("item", 38)):  # the last ones occur where they are put
        change(data, "train", **{name: lambda t, n=name, m=limit: pa.array(t[n].to_numpy() % m)})
    assert message not in findings(data)
    change(data, split, **columns)

    assert message in findings(data)


def test_a_label_that_a_split_lacks_has_no_mean_and_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data")
    schema = data / "schema.yaml"
    label = "stars: {kind: label, loss: mse, nullable: true}"
    schema.write_text(schema.read_text().replace("columns:", f"columns:\n  {label}", 1))
    for split in SPLITS:
        stars = [
            None if split == "valid" else 3.0 + row % 2 for row in range(len(frame(data, split)))
        ]
        change(data, split, stars=pa.array(stars, pa.float32()))
    explain_data(str(data))
    lines = capsys.readouterr().out.splitlines()
    assert ["mean", "of", "label", "stars", "3.5", "-", "3.5"] in map(str.split, lines)
    assert "label 'stars' is null in all valid rows" in findings(data)


def as_history(items: pa.ChunkedArray, table: pa.Table) -> pa.Array:
    """Of each row's own item, as often as the list beside the history is long."""
    return pa.array(
        [
            None if flags is None else [item] * len(flags)
            for item, flags in zip(items.to_pylist(), table["history_liked"].to_pylist())
        ],
        pa.list_(pa.int64()),
    )


def test_repeated_rows_are_found(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    (file,) = (data / "test").glob("*.parquet")
    table = pq.read_table(file)
    write_parquet(file, pa.concat_tables([table, table.slice(0, 5)]))

    assert summarize_dataset(str(data)).splits["test"].distinct[ROWS] == 20
    assert "20.0% of " in findings(data)


def test_rows_of_training_in_another_split_are_found(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    assert "copies of training" not in findings(data)
    shutil.copy(data / "train" / "part-0.parquet", data / "valid" / "part-1.parquet")
    assert f"{30 / 54:.1%} of the valid" in findings(data)


def test_times_are_read_off_the_footers(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    for number, split in enumerate(SPLITS):
        first = datetime(2024, 1, 1 + number).timestamp()
        stamps = lambda t, first=first: pa.array(np.arange(len(t)) + int(first))  # noqa: E731
        change(data, split, timestamp=stamps)
    summary = summarize_dataset(str(data))
    first, last = summary.splits["train"].times["timestamp"]
    assert (last - first).total_seconds() == 59
    assert "2024-01-0" not in findings(data)

    late = [datetime(2025, 5, 5)] * pq.read_metadata(data / "train" / "part-0.parquet").num_rows
    change(data, "train", seen=late)
    change(data, "valid", seen=lambda t: pa.array([datetime(2025, 5, 4)] * len(t)))
    assert "until 2025-05-05 00:00 by column 'seen'" in findings(data)


def test_times_of_other_types_are_compared_as_times(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    moments = {
        "train": pa.scalar(date(2025, 5, 5)),
        "valid": pa.scalar(datetime(2025, 5, 4, tzinfo=UTC), pa.timestamp("us", "UTC")),
        "test": pa.scalar(int(datetime(2025, 5, 6, tzinfo=UTC).timestamp())),
    }
    for split, moment in moments.items():
        change(data, split, ts=lambda t, moment=moment: pa.array([moment.as_py()] * len(t)))
    text = findings(data)
    assert "until 2025-05-05 00:00 by column 'ts', but valid begins" in text
    assert "but test begins" not in text


def test_unused_rows_of_a_table(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    schema = (data / "schema.yaml").read_text()
    (data / "schema.yaml").write_text(schema.replace("num_embeddings: 10}", "num_embeddings: 99}"))
    summary = summarize_dataset(str(data))

    assert (summary.tables["user"].rows, summary.tables["user"].ids) == (99, 10)
    assert "table 'user' has 99 rows, " in findings(data)


def test_numbers_go_to_a_file_and_tables_to_the_screen(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "numbers.json"
    assert main(["explain-data", str(data), "--json", str(out)]) == 0

    numbers = json.loads(out.read_text())
    assert numbers["splits"]["train"]["rows"] == 60
    assert numbers["items"]["columns"]["text"]["missing"] == 2
    printed = capsys.readouterr().out
    assert "label liked" in printed and "characters: p50" in printed


BROKEN = {**bad_files.FILES, **bad_impressions.TYPES, **bad_impressions.VALUES}
del BROKEN["fewer rows than ranks"]  # there are no ranks yet


@pytest.mark.parametrize("case", BROKEN)
def test_what_ends_training_ends_it_with_the_same_words(case: str, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": 61, "valid": 25, "test": 23})
    BROKEN[case].spoil(data)
    with pytest.raises(ValueError) as raised:
        explain_data(str(data))
    for text in BROKEN[case].messages:
        assert text.replace("DATA", str(data)) in str(raised.value)


def test_bad_rows_are_all_told_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data")
    prices = lambda t: pa.array([float("nan"), None, *[0.5] * (len(t) - 2)], pa.float32())  # noqa: E731
    file = change(data, "train", price=prices, item=lambda t: pa.array([*[1] * (len(t) - 1), 30]))

    assert main(["explain-data", str(data)]) == 1
    printed = capsys.readouterr()
    for text in ("null (first: row 1)", "not finite (first: row 0)", "id outside [0, 30)"):
        assert "1 rows cannot" in printed.out and text in printed.out
    assert f"{file}: column 'item', row 59: id 30 is outside [0, 30)" in printed.err
    assert main(["explain-data", str(data), "--on_bad_row", "skip"]) == 0
    assert summarize_dataset(str(data)).splits["train"].usable_rows == 57


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("text", ["one title"] * 30, "items with a 'text' have the same"),
        ("text", [f"{'welcome to our shop ' * 5} {i}" for i in range(30)], "the same 101 char"),
        ("poster", [png(np.random.default_rng(0))] * 30, "items with a 'poster' have the same"),
    ],
)
def test_content_that_is_equal_for_most_items_is_named(
    tmp_path: Path, name: str, values: list[Any], message: str
) -> None:
    data = write_dataset(tmp_path / "data")
    assert message not in findings(data)
    path = data / "items" / "part-0.parquet"
    table = pq.read_table(path)
    index = table.schema.get_field_index(name)
    array = pa.array(values, table.schema.field(name).type)
    write_parquet(path, table.set_column(index, name, array), row_group_size=7)

    assert message in findings(data)


@pytest.mark.parametrize(
    ("categories", "values", "missing"),
    [
        (pa.array([["a", "b"], [], None, ["b", None]] + [["a"]] * 26), 2, 2),
        (pa.array(["a", None, "c"] * 10), 2, 10),
    ],
)
def test_categories_are_counted_one_by_one_in_lists_and_alone(
    categories: pa.Array, values: int, missing: int, tmp_path: Path
) -> None:
    data = with_categories(tmp_path, categories)
    items = explain_data(str(data)).items
    assert items is not None
    column = items.columns["genre"]
    assert (column.values, column.missing) == (values, missing)


def with_categories(folder: Path, categories: pa.Array) -> Path:
    """The small dataset with a category of each item."""
    data = write_dataset(folder / "data")
    file = data / "items" / "part-0.parquet"
    write_parquet(file, pq.read_table(file).append_column("genre", categories))
    schema = (data / "schema.yaml").read_text()
    (data / "schema.yaml").write_text(schema + "    genre: {kind: category}\n")
    return data
