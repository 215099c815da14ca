"""A walk over partitions: what it leaves, that scores come first, and that it goes on exactly."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.checkpoint.files import folders_by_age
from recsys.checkpoint.partitions import ContinualFolder
from recsys.checkpoint.run_schema import schema_of_data
from recsys.cli import main
from recsys.config import ContinualSettings
from recsys.distributed.lockstep import TrainingStopped
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.evaluation.scores import read_scores
from recsys.storage.location import Location
from recsys.storage.output_file import check_output
from recsys.training.continual.partition_run import PartitionTrainer, num_passes
from recsys.training.trainer import LossWatch
from tests.recsys.command_runs import TINY
from tests.recsys.training.changed_answers import set_column
from tests.recsys.training.continual.walk_runs import (
    ARGV,
    NAMES,
    ROWS,
    WITHOUT_CONTENT,
    assert_same_end,
    change_labels,
    files_of,
    lines_of,
    rewound,
    walk,
    write_partition,
    write_walk,
)


def test_each_partition_but_the_first_is_scored_once(walked: Path) -> None:
    lines = lines_of(walked / "run")
    assert [line["partition"] for line in lines] == NAMES[1:]
    assert [line["model_of"] for line in lines] == NAMES[:-1]
    for line, rows in zip(lines, ROWS[1:], strict=True):
        assert line["rows"] == rows and 0 < line["auc"] < 1 and line["unseen"]["num_samples"] > 0
        scores = read_scores(ContinualFolder(walked / "run").scores_of(line["partition"]))
        assert scores.positions.tolist() == list(range(rows))


def test_cold_items_are_those_of_all_partitions_before(walked: Path) -> None:
    folder = ContinualFolder(walked / "run")
    columns = [pq.read_table(walked / "data" / "train" / name)["item"] for name in NAMES[:3]]
    counts = Counter(pa.chunked_array([c for entry in columns for c in entry.chunks]).to_pylist())
    items = pq.read_table(walked / "data" / "train" / NAMES[3])["item"].to_pylist()
    assert read_scores(folder.scores_of(NAMES[3])).counts.tolist() == [counts[i] for i in items]


def test_scores_do_not_depend_on_labels_and_are_whole_before_any_row_is_trained_on(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last partition is poisoned: its labels are turned around."""
    file = rewound(walked, tmp_path).scores_of(NAMES[3])
    change_labels(tmp_path / "data" / "train" / NAMES[3])
    score_bytes: list[bytes] = []
    original = PartitionTrainer.train

    def train(trainer: PartitionTrainer) -> None:
        score_bytes.append(file.read_bytes())
        original(trainer)

    monkeypatch.setattr(PartitionTrainer, "train", train)
    walk(tmp_path, tmp_path / "run")
    assert score_bytes == [file.read_bytes()]  # whole before the first step, and left alone
    poisoned = read_scores(file)
    clean = read_scores(ContinualFolder(walked / "run").scores_of(NAMES[3]))
    assert np.array_equal(poisoned.logits, clean.logits)
    assert np.array_equal(poisoned.labels, 1 - clean.labels)


@pytest.mark.long
def test_a_walk_in_pieces_is_the_walk_at_once(walked: Path, tmp_path: Path) -> None:
    walk(walked, tmp_path / "run", last="2025-11-09")
    walk(walked, tmp_path / "run", first="2025-11-10", last="2025-11-10")
    walk(walked, tmp_path / "run")
    assert assert_same_end(walked / "run", tmp_path / "run") > 50
    old_files = files_of(tmp_path / "run")
    walk(walked, tmp_path / "run")  # nothing is new
    assert files_of(tmp_path / "run") == old_files


def test_items_and_ids_may_arrive_with_their_partitions(walked: Path, tmp_path: Path) -> None:
    argv = ("--continual.order", "time", "--continual.passes", "2")
    for number in range(2):
        write_walk(tmp_path / "data", number + 1)
        walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, *argv)
    assert [line["rows"] for line in lines_of(tmp_path / "run")] == ROWS[1:2]
    (last, *_) = folders_by_age(ContinualFolder(tmp_path / "run").run_of(NAMES[1]) / "checkpoints")
    progress = json.loads((last / "checkpoint.json").read_text())["progress"]
    assert (progress["steps"], progress["steps_before"], progress["epoch"]) == (10, 10, 2)


def test_a_walk_that_was_stopped_goes_on_with_the_same_bits(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rewound(walked, tmp_path)
    with monkeypatch.context() as stopping:
        stop_after(stopping, 2)
        with pytest.raises(TrainingStopped):
            walk(tmp_path, tmp_path / "run")
    state = folder.read()
    assert state.begun is not None and state.begun.name == NAMES[3]
    walk(tmp_path, tmp_path / "run")
    assert assert_same_end(walked / "run", tmp_path / "run") > 50


def test_first_passes_are_over_the_first_partitions_of_a_model_that_starts_from_nothing() -> None:
    settings = ContinualSettings(passes=2, first_passes=[5, 3])
    assert [num_passes(settings, number, True) for number in range(4)] == [5, 3, 2, 2]
    assert [num_passes(settings, number, False) for number in range(2)] == [2, 2]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask this process to end after so many steps."""
    calls, original = [], LossWatch.step

    def step(watch: LossWatch, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(watch, *arguments)

    monkeypatch.setattr(LossWatch, "step", step)


def test_predictions_are_of_the_last_partition(walked: Path, tmp_path: Path) -> None:
    run, inputs = str(walked / "run"), str(walked / "data" / "train" / NAMES[0])
    out = tmp_path / "predictions.parquet"
    assert main(["predict", "--run", run, "--input", inputs, "--out", str(out)]) == 0
    assert pq.read_table(out).num_rows == ROWS[0]
    with pytest.raises(ValueError, match=r"predictions\.parquet: "):
        check_output(walked / "run" / "partitions" / "predictions.parquet")


@pytest.mark.long
def test_commands_on_a_continual_run_take_its_last_partition(walked: Path, tmp_path: Path) -> None:
    run = str(walked / "run")
    tables, page = str(tmp_path / "tables.parquet"), tmp_path / "report.html"
    assert main(["export-tables", "--run", run, "--out", tables]) == 0
    argv = ["export", "--run", run, "--out", str(tmp_path / "package"), "--compile", "false"]
    assert main(argv) == 0
    assert main(["report", "--run", run, "--out", str(page)]) == 0
    text = page.read_text()
    assert all(name in text for name in NAMES[1:]) and "Run run" in text
    argv = ["--data", str(walked / "data"), "--out", str(tmp_path / "run")]
    argv += ["--cache", str(walked / "cache"), "--config", str(TINY), *ARGV]
    command = ["continual", *argv, "--from", "2025-11-11", "--warm-start", run]
    assert main(command) == 0
    (line,) = lines_of(tmp_path / "run")
    assert line["partition"] == NAMES[3] and line["model_of"] == ""
    assert main([*command[:-1], str(walked / "data")]) == 1  # begun from another run


RAW = ["--ranking.scale_inputs", "false"]


def write_counts(folder: Path, *highest: float) -> Path:
    """A walk whose prices, and numbers beside the history, go from 0 to so much on each day."""
    write_walk(folder, len(highest))
    for name, limit in zip(NAMES, highest, strict=False):
        for file in sorted((folder / "train" / name).glob("*.parquet")):
            table, rng = pq.read_table(file), np.random.default_rng(7)
            counts = rng.integers(0, limit + 1, table.num_rows).astype(np.float32)
            counts[:2] = 0, limit
            lists = [
                None if liked is None else (np.array(liked) * limit).tolist()
                for liked in table["history_liked"].to_pylist()
            ]
            table = set_column(table, "price", pa.array(counts))
            table = set_column(table, "history_liked", pa.array(lists, pa.list_(pa.float32())))
            pq.write_table(table, file, row_group_size=11)
    return folder


@pytest.mark.parametrize("name", ["din_dcn", "two_tower"])
def test_counts_are_standardized_by_default(name: str, tmp_path: Path) -> None:
    write_counts(tmp_path / "data", 340, 340)
    argv = [*WITHOUT_CONTENT, "--ranking.name", name]
    if name == "two_tower":
        argv += ["--ranking.query_features", "[price]"]
    walk(tmp_path, tmp_path / "run", *argv)
    (line,) = lines_of(tmp_path / "run")
    assert line["logloss"] < 1


def test_useless_scores_end_the_walk_with_the_column_behind_what_is_written(
    tmp_path: Path,
) -> None:
    write_counts(tmp_path / "data", 340, 340, 340)
    argv = [*WITHOUT_CONTENT, *RAW]
    message = rf"{NAMES[1]}, scored by the model of {NAMES[0]}: .*'price' \(0 to 340\)"
    with pytest.raises(ValueError, match=message):
        walk(tmp_path, tmp_path / "run", *argv)
    state = ContinualFolder(tmp_path / "run").read()
    assert [partition.name for partition in state.trained] == NAMES[:2] and state.begun is None
    with pytest.raises(ValueError, match=NAMES[2]):
        walk(tmp_path, tmp_path / "run", *argv)
    assert [line["partition"] for line in lines_of(tmp_path / "run")] == NAMES[1:3]


def test_a_column_is_standardized_from_the_day_on_that_it_is_wide(tmp_path: Path) -> None:
    write_counts(tmp_path / "data", 1, 1, 4)
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT)
    folder = ContinualFolder(tmp_path / "run")
    with joined_ranks("cpu") as ranks:
        scalings = [
            load_run(folder.run_of(name), None, ranks, "cpu").em3.scaling for name in NAMES[1:3]
        ]
    assert scalings[0] is not None and scalings[1] is not None
    assert scalings[0].names == ["price", "history_liked"] and not scalings[0].is_scaled.any()
    prices = pq.read_table(tmp_path / "data" / "train" / NAMES[2])["price"].to_numpy()
    assert scalings[1].is_scaled.all()
    assert float(scalings[1].mean[0]) == pytest.approx(prices.mean(), rel=1e-5)
    assert float(scalings[1].deviation[0]) == pytest.approx(prices.std(), rel=1e-5)


def test_a_partition_that_is_begun_goes_on_when_its_tables_get_rows_for_later_days(
    walked: Path, tmp_path: Path
) -> None:
    run = rewound(walked, tmp_path).run_of(NAMES[2])
    file = tmp_path / "data" / "schema.yaml"
    root = Location.of(tmp_path / "data")
    file.write_text(file.read_text().replace("num_embeddings: 40", "num_embeddings: 60"))
    with joined_ranks("cpu") as ranks:
        assert schema_of_data(run, root, ranks, is_resumed=True).limit("item") == 40
    file.write_text(file.read_text().replace("num_embeddings: 60", "num_embeddings: 39"))
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match="num_embeddings"):
        schema_of_data(run, root, ranks, is_resumed=True)


def test_tables_grow_with_the_ids_of_partitions_and_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`num_embeddings` is 15, for 14, 18, 22 and 30 items; a table has a free row for 4 ids."""
    data = write_walk(tmp_path / "data")
    file, root = data / "schema.yaml", Location.of(data)
    text = file.read_text().replace("num_embeddings: 40", "num_embeddings: 15")
    file.write_text(text)
    folder, rows = ContinualFolder(tmp_path / "run"), []
    for number, name in enumerate(NAMES):
        for later in NAMES[number + 1 :]:  # items of later days are not there yet
            (data / "items" / f"part-{NAMES.index(later)}.parquet").unlink(missing_ok=True)
        write_partition(data, number)
        caplog.clear()
        with caplog.at_level("INFO"):
            walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, last=name)
        with joined_ranks("cpu") as ranks:
            schema = schema_of_data(folder.run_of(name), root, ranks, is_resumed=True)
            rows.append(schema.limit("item"))
            assert schema.grown == ({"item": 15} if number else {})
            assert load_run(folder.run_of(name), None, ranks, "cpu").schema.num_items == rows[-1]
        line = f"table 'item' has {rows[-1]} rows: num_embeddings of schema.yaml, 15, is too few"
        assert (line in caplog.text) == (number > 0)
    assert rows == [15, 23, 23, 38] and file.read_text() == text
    assert [entry["partition"] for entry in lines_of(tmp_path / "run")] == NAMES[1:]


def test_items_beyond_the_rows_of_a_run_are_refused_until_the_next_partition(
    two: Path,
) -> None:
    folder, data = ContinualFolder(two / "run"), str(two / "data")
    items = pa.table({"item": np.arange(1000, 1030), "text": ["new"] * 30})
    pq.write_table(items, two / "data" / "items" / "part-9.parquet")
    problem = r"30 items are new, and table 'item' .* has room for 21; `recsys continual`"
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=problem):
        load_run(folder.run_of(NAMES[1]), data, ranks, "cpu")
    write_partition(two / "data", 2)
    walk(two, two / "run", *WITHOUT_CONTENT)
    with joined_ranks("cpu") as ranks:
        assert load_run(folder.run_of(NAMES[2]), data, ranks, "cpu").schema.num_items == 66
