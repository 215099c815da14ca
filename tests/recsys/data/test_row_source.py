"""Rows from a source of one's own: a class in a file and a line of YAML."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.config import SourceSettings
from recsys.data.item_frequency import count_items
from recsys.data.row_source import Chunk, RowSource, Window, open_rows
from recsys.data.schema import Schema, load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY, page_code, run_recsys, train_argv


class Counted(RowSource):
    """Rows that are made, not read: row n has the item n."""

    def __init__(
        self, root: Location, split: str, schema: Schema, sizes: list[int], extra_rows: int = 0
    ) -> None:
        super().__init__(schema, [Chunk(f"chunk-{n}", size) for n, size in enumerate(sizes)])
        self.starts, self.extra_rows = [sum(sizes[:n]) for n in range(len(sizes))], extra_rows

    def read_chunk(self, number: int) -> pa.Table:
        start, size = self.starts[number], self.chunks[number].num_rows + self.extra_rows
        items = list(range(start, start + size))
        lists = pa.array([[]] * size, pa.list_(pa.int64()))
        return pa.table(
            {
                "user": [0] * size,
                "item": items,
                "history": lists,
                "history_liked": lists.cast(pa.list_(pa.float32())),
                "genres": lists,
                "price": [0.5] * size,
                "liked": [1.0] * size,
            }
        )


def opened(tmp_path: Path, name: str = f"{__name__}:Counted", **options: object) -> RowSource:
    root = Location.of(write_dataset(tmp_path / "data"))
    return open_rows(SourceSettings(name, options), root, "train", load_schema(root))


def test_rows_of_all_chunks_stand_in_one_order_and_are_counted(tmp_path: Path) -> None:
    rows = opened(tmp_path, sizes=[3, 2, 4])
    assert rows.num_rows == 9
    assert [rows.share(rank, 2) for rank in range(2)] == [(0, 4), (4, 9)]
    tables = pa.concat_tables(rows.read(2, 7))
    assert tables["item"].to_pylist() == [2, 3, 4, 5, 6]
    assert count_items(rows, 1, 2).of(np.arange(10)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    assert rows.describe_range(tables["item"].to_numpy()) == "chunk-0 row 2 and chunk-2 row 1"


def test_rows_read_once_are_those_of_windows_and_kept_chunks_are_read_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, read = opened(tmp_path, sizes=[3, 2, 4]), list[int]()
    read_chunk = rows.read_chunk

    def counted(number: int) -> pa.Table:
        read.append(number)
        return read_chunk(number)

    monkeypatch.setattr(rows, "read_chunk", counted)
    expected = pa.concat_tables(rows.read(1, 8))
    assert pa.concat_tables(rows.read_once(1, 8)).equals(expected)
    assert read == [0, 1, 2] * 2

    window = Window(2, 5)
    rows.keep(window)
    for _ in range(2):
        assert pa.concat_tables(rows.read_once(1, 8)).equals(expected)
        assert rows.read_window(window).equals(expected.slice(1, 3))
    assert read == [0, 1, 2] * 3 + [2]  # only the chunk beside the window is read again


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("parket", {}, r"source\.name 'parket' is unknown; .*\['parquet'\]"),
        ("parquet", {"files": 1}, r"source\.name 'parquet' .*'files'"),
        ("pathlib:Path", {}, r"source\.name 'pathlib:Path' "),
        (f"{__name__}:Counted", {"sizes": []}, "Counted: .*rows"),
    ],
)
def test_a_source_that_cannot_be_is_refused(
    tmp_path: Path, name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, name, **options)


def test_what_a_source_reads_is_checked_as_files_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chunk-0: 4 rows .*3 "):
        list(opened(tmp_path, sizes=[3], extra_rows=1).read(0, 3))
    with pytest.raises(ValueError, match=r"chunk-1: column 'item', row 2: id 30 is outside"):
        list(opened(tmp_path, sizes=[28, 5]).read(0, 33))


def test_a_source_of_one_s_own_trains_and_evaluates_as_the_same_rows_in_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data")
    lines = tmp_path / "lines"
    write_dataset(lines)
    for path in sorted(lines.glob("*/*.parquet")):
        if path.parent.name != "items":
            rows = pq.read_table(path).to_pylist()
            text = "".join(json.dumps(row) + "\n" for row in rows)
            path.with_suffix(".jsonl").write_text(text)
            path.unlink()
    (tmp_path / "my_rows.py").write_text(page_code("recsys/training/README.md", "JsonLines"))
    source = {"name": "my_rows:JsonLines", "options": {"lines_per_chunk": 64}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(TINY.read_text()) | {"source": source}))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reports = []
    for folder, config in ((data, TINY), (lines, recipe)):
        argv = train_argv(folder, folder.parent / f"{folder.name}-run", "--content", "none")
        argv[argv.index(str(TINY))] = str(config)
        process = run_recsys(*argv)
        assert process.returncode == 0, process.stdout + process.stderr
        reports.append(json.loads((tmp_path / f"{folder.name}-run" / "metrics.json").read_text()))
    assert reports[0]["test"]["num_samples"] == reports[1]["test"]["num_samples"] == 20
    assert reports[0]["train"]["steps"] == reports[1]["train"]["steps"] == 8
    run = str(tmp_path / "lines-run")
    again = run_recsys("evaluate", "--run", run, "--data", str(lines), "--device", "cpu")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{reports[1]['test']['logloss']:.4f}" in again.stdout
