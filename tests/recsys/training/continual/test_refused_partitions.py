"""Partitions that end a walk or are passed over: with the fix, and none is lost."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.build import Job
from recsys.checkpoint.partitions import ContinualFolder, RunState
from recsys.cli import main
from recsys.config import NeighbourSettings
from recsys.training import neighbour_statistics
from recsys.training.neighbour_statistics import Events
from tests.recsys.training.continual.test_followed_walks import arguments_of, names_of, wait_for
from tests.recsys.training.continual.test_scores_first import assert_predicted_alike
from tests.recsys.training.continual.walk_runs import (
    NAMES,
    WITHOUT_CONTENT,
    change_labels,
    files_of,
    lines_of,
    rewound,
    walk,
    write_partition,
    write_walk,
)

NEXT = NAMES[2]


@pytest.fixture
def three(two: Path) -> Path:
    """A run that has walked two partitions, with the third one beside it."""
    write_partition(two / "data", 2)
    return two


def cut_short(data: Path) -> None:
    file = data / "train" / NEXT / "part-1.parquet"
    file.write_bytes(file.read_bytes()[:-9])


def copied(data: Path) -> None:
    shutil.rmtree(data / "train" / NEXT)
    shutil.copytree(data / "train" / NAMES[0], data / "train" / NEXT)


def rewritten(data: Path) -> None:
    change_labels(data / "train" / NAMES[0])
    file = data / "train" / NAMES[0] / "part-0.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)


def bad_label(data: Path) -> None:
    file = data / "train" / NEXT / "part-1.parquet"
    table = pq.read_table(file)
    labels = pa.array([7.0, *table["liked"].to_pylist()[1:]], pa.float32())
    index = table.column_names.index("liked")
    pq.write_table(table.set_column(index, "liked", labels), file)


FAULTS = [
    (cut_short, r"part-1\.parquet"),
    (copied, rf"{NEXT}: has the 40 rows of {NAMES[0]}"),
    (rewritten, rf"{NAMES[0]}: has changed .*then 40 rows, now 39"),
    (bad_label, r"part-1\.parquet.*'liked'.*7"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_partition_that_cannot_be_used_leaves_the_run_as_it_was(
    three: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(three / "data", tmp_path / "data")
    change(tmp_path / "data")
    old_files = files_of(three / "run")
    with pytest.raises(ValueError, match=message):
        walk(three, three / "run", *WITHOUT_CONTENT, data=tmp_path / "data")
    assert files_of(three / "run") == old_files


def test_a_partition_whose_weights_are_all_0_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    """Once scored, neither other weights nor a folder less was accepted."""
    data = write_walk(tmp_path / "data", 2)
    schema = yaml.safe_load((data / "schema.yaml").read_text())
    schema["columns"]["times"] = {"kind": "weight"}
    (data / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    for name, weight in zip(NAMES, (1.0, 0.0)):
        for file in (data / "train" / name).glob("*.parquet"):
            table = pq.read_table(file, partitioning=None)
            weights = pa.array([weight] * table.num_rows)
            pq.write_table(table.append_column("times", weights), file)
    with pytest.raises(ValueError, match=rf"train/{NAMES[1]}: column 'times' is 0"):
        walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT)
    assert ContinualFolder(tmp_path / "run").read().begun is None


def test_a_run_whose_newest_model_is_gone_is_refused_by_its_folder(
    three: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(three / "run", tmp_path / "run")
    newest = ContinualFolder(run).run_of(ContinualFolder(run).read().trained[-1].name)
    shutil.rmtree(newest)
    with pytest.raises(ValueError, match=rf"{newest}: .*{NEXT}.*another --out"):
        walk(three, run, *WITHOUT_CONTENT)


def test_the_first_partition_begins_with_the_run_that_it_was_begun_from(tmp_path: Path) -> None:
    write_walk(tmp_path / "data", 1)
    folder = ContinualFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write(RunState(warm_start="runs/shop"))  # killed before its first checkpoint
    with pytest.raises(ValueError, match=r"--warm-start runs/shop, and .* without --warm-start"):
        walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ranking.mlp_units", "[8]"], r"ranking\.mlp_units was .*--warm-start"),
        (["--continual.order", "time"], r"continual\.order was shuffled.*time"),
    ],
)
def test_another_model_or_order_is_refused(three: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        walk(three, three / "run", *WITHOUT_CONTENT, *argv)


def test_items_whose_ids_mean_others_are_refused_and_edited_ones_encoded(
    walked: Path, tmp_path: Path
) -> None:
    rewound(walked, tmp_path)
    file = tmp_path / "data" / "items" / "part-0.parquet"
    items = pq.read_table(file)
    texts = pa.array([f"other {number}" for number in range(items.num_rows)])
    pq.write_table(items.set_column(1, "text", texts), file)
    with pytest.raises(ValueError, match=r"items: 14 of 30 known items .*0\.1"):
        walk(tmp_path, tmp_path / "run", "--continual.edited_items", "0.1")
    assert len(walk(tmp_path, tmp_path / "run").trained) == 4


def test_folders_of_other_runs_are_refused(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(three / "data"), "--out", str(three / "run")]
    assert main(["train", "--content", "none", *argv]) == 1
    assert f"{three / 'run'}: " in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="`recsys train`"):
        walk(three, tmp_path / "run", *WITHOUT_CONTENT)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "continual.json").write_text("{}")
    with pytest.raises(ValueError, match=r"continual\.json: damaged"):
        walk(three, tmp_path / "new", *WITHOUT_CONTENT)


LATE, FUTURE = "date=2025-11-07", "date=2062-11-09"


def add(folder: Path, name: str) -> None:
    """Write the third partition under another name."""
    partition = write_partition(folder / "data", 2)
    partition.rename(partition.with_name(name))


def test_a_late_partition_is_trained_on_without_scores_where_that_is_asked(two: Path) -> None:
    """The next one is scored by the model that knows it, and counts its items."""
    add(two, LATE)
    argv = [*WITHOUT_CONTENT, "--continual.late", "train"]
    walk(two, two / "run", *argv)
    assert names_of(two / "run") == [*NAMES[:2], LATE]
    assert [line["partition"] for line in lines_of(two / "run")] == [NAMES[1]]
    write_partition(two / "data", 3)
    walk(two, two / "run", *argv)
    assert names_of(two / "run") == [*NAMES[:2], LATE, NAMES[3]]
    line = lines_of(two / "run")[-1]
    assert (line["partition"], line["model_of"]) == (NAMES[3], LATE)
    folder = ContinualFolder(two / "run")
    shutil.copytree(folder.run_of(LATE), folder.run_of(NAMES[2]))  # the name of the day before
    assert_predicted_alike(two, 3, two / "predicted.parquet", line)


def test_statistics_of_neighbours_are_of_the_latest_partitions_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = list[list[str]]()
    gather = neighbour_statistics.gather_events

    def gather_events(
        job: Job, settings: NeighbourSettings, names: list[str], starts: None
    ) -> Events:
        folders.append(names)
        return gather(job, settings, names, starts)

    monkeypatch.setattr(neighbour_statistics, "gather_events", gather_events)
    argv = [*WITHOUT_CONTENT, "--neighbours", "{dim: 4, partitions: 1}"]
    argv += ["--continual.late", "train"]
    write_walk(tmp_path / "data", 0)
    for number in (1, 2, 0, 3):  # the first day is late
        write_partition(tmp_path / "data", number)
        walk(tmp_path, tmp_path / "run", *argv)
    old_names = [names[1:] for names in folders]
    assert old_names == [[], [f"train/{NAMES[1]}"], *[[f"train/{NAMES[2]}"]] * 2]


def test_a_partition_that_would_block_all_later_ones_is_named_behind_the_others(two: Path) -> None:
    add(two, FUTURE)
    write_partition(two / "data", 2)
    with pytest.raises(ValueError, match=rf"train/{FUTURE}: .*rename or remove it"):
        walk(two, two / "run", *WITHOUT_CONTENT)
    assert names_of(two / "run") == NAMES[:3]
    write_partition(two / "data", 3)
    with pytest.raises(ValueError, match=rf"train/{FUTURE}"):
        walk(two, two / "run", *WITHOUT_CONTENT)
    assert names_of(two / "run") == NAMES[:4]
    walk(two, two / "run", *WITHOUT_CONTENT, last="2025-11-30")  # what lies behind is not asked for


def test_a_walk_that_follows_names_it_and_goes_on_with_others(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(two, FUTURE)

    def write() -> None:
        write_partition(two / "data", 2)
        wait_for(two / "run", 3)
        os.kill(os.getpid(), signal.SIGTERM)

    writer = threading.Timer(2.0, write)
    writer.start()
    assert main(arguments_of(two, "--follow", "--continual.poll_seconds", "0.1")) == 0
    writer.join()
    assert names_of(two / "run") == NAMES[:3]
    printed = capsys.readouterr().out
    assert f"train/{FUTURE}: lies" in printed and "days in the future" in printed


def test_a_late_partition_ends_a_walk_that_follows_with_its_name(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(two, LATE)
    assert main(arguments_of(two, "--follow", "--continual.poll_seconds", "0.1")) == 1
    assert f"train/{LATE}: is older than" in capsys.readouterr().err
