"""Columns, tables and settings that differ: each by its rule, or refused by name. Nothing is built.

The rows of tables are compared through `row_map`, which reads the run's maps of raw ids.
"""

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embeddings.vocabulary.bounded import set_layout
from embeddings.vocabulary.fixed import mix64
from recsys.checkpoint.warm_start.rows import RowMap, row_map
from recsys.checkpoint.warm_start.source import (
    Differences,
    Source,
    WarmStart,
    compare_settings,
    open_source,
    reconciled_schema,
)
from recsys.config import ranking_settings
from recsys.data.schema import Schema
from recsys.data.schema_columns import IdType
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.storage.location import Location
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    Change,
    changed,
    config_of,
    ids_of,
    write_ids,
)


@dataclass(frozen=True)
class Opened:
    """A run that was opened to start from."""

    folder: Path
    source: Source
    ranks: Ranks

    def fresh_source(self) -> Source:
        return replace(self.source, differences=Differences())

    def schema(self, data: Path) -> tuple[Schema, str]:
        """The reconciled schema and the differences of columns."""
        source = self.fresh_source()
        return reconciled_schema(source, Location.of(data)), str(source.differences)

    def rows(self, data: Path, table: str) -> tuple[RowMap | None, Differences]:
        """The map of a table and its differences alone."""
        schema, _ = self.schema(data)
        source = self.fresh_source()
        return row_map(table, source, schema, self.ranks), source.differences


@pytest.fixture(scope="module")
def opened(plain: Path) -> Iterator[Opened]:
    with joined_ranks("cpu") as ranks:
        source = open_source(WarmStart(plain / "run"), plain / "out", ranks)
        yield Opened(plain, source, ranks)


def column(name: str, **attributes: Any) -> Change:
    """Sets attributes of a column, None removes one."""

    def change(schema: dict[str, Any]) -> None:
        settings = schema["columns"].setdefault(name, {})
        settings |= attributes
        for key in [key for key, value in settings.items() if value is None]:
            del settings[key]

    return change


def without(name: str) -> Change:
    return lambda schema: schema["columns"].pop(name)


def test_columns_labels_and_lists_are_read_in_the_order_of_the_run(
    opened: Opened, tmp_path: Path
) -> None:
    def reverse(schema: dict[str, Any]) -> None:
        schema["columns"] = dict(reversed(schema["columns"].items()))
        schema["columns"]["history"]["parallel"].reverse()

    schema, text = opened.schema(changed(opened.folder, tmp_path, reverse))
    assert text == "nothing differs"
    assert list(schema.columns) == list(opened.source.schema.columns)
    assert schema.columns["history"].parallel == ["history_liked", "history_age"]


def test_types_of_what_transforms_hash_are_those_of_the_run(opened: Opened) -> None:
    trained = opened.source.schema
    id_types = trained.id_types | {"maker": IdType("string", "train/part-0.parquet")}
    schema = copy(trained)
    schema.id_types = id_types
    source = replace(opened.source, schema=schema)
    data = reconciled_schema(source, Location.of(opened.folder / "data"))
    assert data.id_types["maker"].name == "string"
    with pytest.raises(ValueError, match=r"'maker' has integer ids .*schema\.yaml has string ids"):
        data.require_id_type("maker", pa.int64(), "new/part-0.parquet", "maker")


BOUNDED = {"kind": "bounded", "admit_after": 2, "half_life": 50.0}
LISTED: list[tuple[Change, str]] = [
    (column("weekday", kind="dense"), r"column 'weekday' .*  added"),
    (without("shop"), r"column 'shop' .*  dropped"),
    (column("history", parallel=["history_age"]), r"list 'history_liked' .*dropped"),
    (lambda schema: schema.update(group="shop"), r"group .*run: user, data: shop"),
    (column("bought", loss="mse"), r"'bought' +loss .*bce.*mse"),
    (column("bought", nullable=True), r"column 'bought' +nullable was None, is True"),
    (column("user", vocabulary=BOUNDED | {"admit_after": 3}), r"'user' .*admit_after was 2, is 3"),
]
REFUSED: list[tuple[Change, str]] = [
    (column("shop", kind="ids"), r"'shop': kind .*id.*ids"),
    (column("price", kind="extra"), r"'price': kind .*dense.*extra"),
    (column("scaled", transform=["log1p"]), r"column 'scaled': .*transform"),
    (lambda schema: schema.update(target_item="shop"), r"target_item|first sequence"),
]


@pytest.mark.parametrize(("change", "line"), LISTED)
def test_a_column_that_differs_is_listed_with_its_rule(
    opened: Opened, tmp_path: Path, change: Change, line: str
) -> None:
    _, text = opened.schema(changed(opened.folder, tmp_path, change))
    assert re.search(line, text), text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(("change", "line"), REFUSED)
def test_a_column_that_means_something_else_is_refused(
    opened: Opened, tmp_path: Path, change: Change, line: str
) -> None:
    data = changed(opened.folder, tmp_path, change)
    (data / "transforms.yaml").unlink()  # values that are not fitted are those of the run
    with pytest.raises(ValueError, match=line):
        opened.schema(data)


def test_fitted_values_are_those_of_the_run(opened: Opened, tmp_path: Path) -> None:
    data = changed(opened.folder, tmp_path, lambda _: None)
    file = data / "transforms.yaml"
    fitted = opened.source.schema.transforms["scaled"]
    mean = fitted.steps[0].settings["mean"]
    file.write_text(file.read_text().replace(str(mean), "7.5"))
    schema, text = opened.schema(data)
    assert schema.transforms["scaled"] == fitted
    assert re.search(r"'scaled' .*transform.*  fit of", text)
    file.unlink()
    assert opened.schema(data)[0].transforms["scaled"] == fitted


# Rows of tables


def test_a_table_whose_ids_are_rows_grows_at_its_end(opened: Opened, tmp_path: Path) -> None:
    data = changed(opened.folder, tmp_path, column("shop", num_embeddings=8))
    rows, differences = opened.rows(data, "shop")
    assert rows is not None
    assert rows.find(0, 8).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert rows.find(3, 6).tolist() == [3, 4, -1]
    assert re.search(r"'shop' .*from 5 to 8 rows +3 rows with initial", str(differences))


def renumbered(ids: list[int]) -> list[int]:
    """Other numbers, two ids gone and two new ones."""
    return [901, *reversed(ids[2:]), 902]


def extended(ids: list[int]) -> list[int]:
    return [*ids, 903]


@pytest.mark.parametrize(
    ("change", "size"),
    [(list, 40), (list, 31), (extended, 55), (renumbered, 40)],
)
def test_rows_of_an_exact_map_follow_the_raw_ids(
    opened: Opened, tmp_path: Path, change: Any, size: int
) -> None:
    old_ids = ids_of(opened.folder / "data")
    new_ids = change(old_ids)
    data = changed(opened.folder, tmp_path, column("item", num_embeddings=size))
    rows, differences = opened.rows(write_ids(data, new_ids), "item")
    assert rows is not None
    row_of_id = {raw: row for row, raw in enumerate(old_ids)}
    expected = [row_of_id.get(raw, -1) for raw in new_ids] + [-1] * (size - 1 - len(new_ids)) + [39]
    assert rows.find(0, size).tolist() == expected
    assert rows.find(5, size - 3).tolist() == expected[5:-3]
    assert rows.new_rows(np.arange(30)).tolist() == [
        new_ids.index(raw) if raw in new_ids else -1 for raw in old_ids
    ]
    if rows.is_identity:
        assert size == 40 and new_ids == old_ids and not differences.reconciled
    else:
        assert f"{len(set(new_ids) - set(old_ids))} are new" in str(differences)
        assert f"{len(set(old_ids) - set(new_ids))} are gone" in str(differences)


@pytest.mark.parametrize("size", [40, 400])
def test_ids_of_a_bounded_vocabulary_go_to_the_sets_of_the_new_size(
    opened: Opened, tmp_path: Path, size: int
) -> None:
    data = changed(opened.folder, tmp_path, column("user", num_embeddings=size))
    rows, differences = opened.rows(data, "user")
    assert rows is not None
    ids, last_used = (
        opened.source.model.tensor(f"vocabulary.user.{name}").rows(0, 1).flatten().numpy()
        for name in ("ids", "last_used")
    )
    used_rows = np.flatnonzero(last_used >= 0)
    assert len(used_rows) > 4
    old_rows = rows.find(0, size)
    assert sorted(old_rows[old_rows >= 0]) == [
        *used_rows,
        11,
    ]  # last: of unknown ids
    assert old_rows[size - 1] == 11
    num_sets, per_set = set_layout(size)
    slots = np.flatnonzero(old_rows[:-1] >= 0)
    sets = (mix64(ids[old_rows[slots]]) % np.uint64(num_sets)).astype(int)
    assert (slots // per_set == sets).all()
    chunks = [rows.find(start, min(start + 33, size)) for start in range(0, size, 33)]
    assert np.concatenate(chunks).tolist() == old_rows.tolist()
    assert re.search(rf"{len(used_rows)} ids keep .*, 0 have no", str(differences))


def test_the_least_used_ids_have_no_room_in_a_smaller_bounded_table(
    opened: Opened, tmp_path: Path
) -> None:
    data = changed(opened.folder, tmp_path, column("user", num_embeddings=4))
    rows, differences = opened.rows(data, "user")
    assert rows is not None
    last_used, scores = (
        opened.source.model.tensor(f"vocabulary.user.{name}").rows(0, 1).flatten().numpy()
        for name in ("last_used", "scores")
    )
    worth = np.where(last_used >= 0, np.log2(np.maximum(scores, 1e-9)) + last_used / 50.0, -np.inf)
    order = np.lexsort((np.arange(11), -last_used, -worth))
    assert rows.find(0, 4).tolist() == [*order[:3], 11]
    assert f"{(last_used >= 0).sum() - 3} have no room" in str(differences)


@pytest.mark.parametrize(
    ("table", "change", "line"),
    [
        ("shop", column("shop", num_embeddings=4), r"'shop': had 5 rows, num_embeddings is 4"),
        ("shop", column("shop", vocabulary={"kind": "hash"}), r"'shop': .*rows.*kind hash"),
        (
            "genres",
            column("genres", vocabulary={"kind": "hash", "num_hashes": 2, "seed": 4}),
            r"'genres': .*\(50, 2, 1\).*\(50, 2, 4\)",
        ),
    ],
)
def test_a_table_whose_rows_are_of_other_ids_is_refused_with_the_pattern_to_skip_it(
    opened: Opened, tmp_path: Path, table: str, change: Change, line: str
) -> None:
    rows, differences = opened.rows(changed(opened.folder, tmp_path, change), table)
    assert rows is None
    with pytest.raises(ValueError, match=line) as refused:
        differences.check("RUN")
    assert f"--warm-start-skip '*.{table}.weight'" in str(refused.value)


@pytest.mark.parametrize("ids", [["a", "b"], [1001, 1002]])
def test_an_exact_map_without_an_id_of_the_run_is_refused(
    opened: Opened, tmp_path: Path, ids: list[Any]
) -> None:
    data = write_ids(changed(opened.folder, tmp_path, lambda _: None), ids)
    rows, differences = opened.rows(data, "item")
    assert rows is None
    with pytest.raises(ValueError, match="'item': "):
        differences.check("RUN")


# Settings


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["--optimizer.learning_rate", "1", "--epochs", "9"], []),
        (["--seed", "3"], ["setting seed"]),
    ],
)
def test_a_setting_that_means_more_than_how_long_to_train_is_listed(
    opened: Opened, argv: list[str], lines: list[str]
) -> None:
    config = config_of(opened.folder, *WITHOUT_CONTENT, "--epochs", "2", *argv)
    source = opened.fresh_source()
    compare_settings(source, config)
    assert [difference.part for difference in source.differences.reconciled] == lines


def test_weights_of_another_ranking_model_are_refused(opened: Opened) -> None:
    config = config_of(opened.folder, *WITHOUT_CONTENT)
    config.ranking = ranking_settings("dlrm")
    source = opened.fresh_source()
    compare_settings(source, config)
    with pytest.raises(ValueError, match=r"ranking\.name: .*dlrm.*skip 'ranking"):
        source.differences.check("RUN")
