"""Files appear whole or not at all, and outputs are checked before any work."""

import os
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.storage.files import (
    atomic_file,
    atomic_folder,
    atomic_write,
    recover_folder,
    replace_folder,
)
from recsys.storage.location import Location
from recsys.storage.output_file import check_output, check_run_folder


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(page, "new \ud800")  # a lone surrogate has no UTF-8
    assert page.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    "name", ["A.PARQUET", "a.parq", "day=1/a.parquet", "day=1/hour=2/a.parquet"]
)
def test_files_that_would_be_left_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "train" / "notes").mkdir(parents=True)
    for other in ("part-0.parquet", "_SUCCESS", ".x.parquet.crc", "read.me"):
        (tmp_path / "train" / other).write_text("")
    folder = Location.of(tmp_path / "train")
    assert [str(file) for file in folder.files(".parquet")] == [f"{folder}/part-0.parquet"]
    (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "train" / name).write_text("")
    with pytest.raises(ValueError, match=name.split("/")[0]):
        folder.files(".parquet")


def test_files_of_hive_partitions_are_those_of_the_folder(tmp_path: Path) -> None:
    names = ["day=1/hour=9/a.parquet", "day=2/hour=1/a.parquet", "day=2/hour=1/b.parquet"]
    for name in [*names, "day=2/_SUCCESS", "day=2/.x.parquet"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    folder = Location.of(tmp_path)
    assert [str(file) for file in folder.files(".parquet")] == [f"{folder}/{n}" for n in names]
    (tmp_path / "day=2" / "hour=1" / "more").mkdir()
    (tmp_path / "day=2" / "hour=1" / "more" / "c.parquet").write_text("")
    with pytest.raises(ValueError, match="hour=1/more"):
        folder.files(".parquet")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new") as partial:
        (partial / "part").write_text("1")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "part").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new") as partial:
        (partial / "part").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("may_exist", [False, True])
def test_of_two_folders_the_first_stays(tmp_path: Path, may_exist: bool) -> None:
    with (
        nullcontext() if may_exist else pytest.raises(OSError),
        atomic_folder(tmp_path / "new", may_exist) as partial,
    ):
        (partial / "part").write_text("second")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "part").write_text("first")
    assert (tmp_path / "new" / "part").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_replaces_an_older_one_and_a_kill_between_is_undone(tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / "part").write_text(text)
        replace_folder(tmp_path / "partial", tmp_path / "best")
    assert (tmp_path / "best" / "part").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    (tmp_path / "best").rename(tmp_path / ".best.old")  # where a kill leaves it
    recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "part").read_text() == "new"


@pytest.mark.parametrize("name", ["a::b", "zip::a", "s3:a", "data:a", "file:a", "a b%20[1]*?#é"])
def test_any_name_of_a_local_folder_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (name, f"./{name}/", str(tmp_path / name)):
        location = Location.of(url)
        assert location.is_local and location.path == str(tmp_path / name)
        assert not location.exists()
    Path(name).mkdir()
    table = pa.table({"column": [1]})
    with atomic_file(Path(name, "x:y.parquet")) as partial:
        pq.write_table(table, partial)
    (file,) = Location.of(name).files(".parquet")
    assert pq.read_table(file.path, filesystem=file.arrow).equals(table)


def test_a_url_is_read_through_its_filesystem() -> None:
    chained = Location.of("simplecache::memory://shop/data")
    assert not chained.is_local and chained.path == "/shop/data"
    assert Location.of("file:///tmp/shop/").path == "/tmp/shop"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset, a run and files elsewhere, all empty, and links to them."""
    for name in (
        "data/schema.yaml",
        "data/test/part-0.parquet",
        "run/schema.yaml",
        "run/config.yaml",
        "run/scores_test.parquet",
        "run/comparison.json",
        "run/.job.json",
        "other/rows.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.parquet").symlink_to(tmp_path / "other" / "rows.parquet")
    (tmp_path / "test").symlink_to(tmp_path / "data" / "test")
    return tmp_path / "data"


REFUSED = (
    "data",
    "data/test/predictions.parquet",
    "data/items/tables.parquet",
    "data/schema.yaml",
    "test/predictions.parquet",
    "run/config.yaml",
    "run/scores_test.parquet",
    "run/.lock",
    "run/checkpoints/best/tables.parquet",
    "run/tensorboard/report.html",
    "other/rows.parquet",
    "link.parquet",
    "other/rows.parquet/predictions.parquet",
)


@pytest.mark.parametrize("out", REFUSED)
def test_an_output_that_is_or_becomes_an_input_is_refused(data: Path, out: str) -> None:
    path = data.parent / out
    inputs = [Location.of(data / "test"), Location.of(data.parent / "other" / "rows.parquet")]
    with pytest.raises(ValueError, match=path.name):
        check_output(path, inputs)


@pytest.mark.parametrize(
    "out", ["predictions.parquet", "data/predictions.parquet", "run/comparison.json", "a/b/c.html"]
)
def test_any_other_file_may_be_written(data: Path, out: str) -> None:
    check_output(data.parent / out, [Location.of(data / "test"), Location.of("memory://rows")])


@pytest.mark.parametrize("run", ["data", "data/train", "test", "run/checkpoints/best"])
def test_a_run_is_not_put_where_its_files_would_be_data(data: Path, run: str) -> None:
    with pytest.raises(ValueError, match=run):
        check_run_folder(data.parent / run, str(data))
    check_run_folder(data.parent / "run", str(data))
    check_run_folder(data / "runs", str(data))


def test_a_file_is_no_folder_of_a_run(data: Path) -> None:
    (data.parent / "notes").touch()
    with pytest.raises(ValueError, match=r"notes: .*--out"):
        check_run_folder(data.parent / "notes", str(data))


def test_a_project_may_call_the_folder_of_its_runs_checkpoints(data: Path) -> None:
    (data.parent / "config.yaml").touch()
    check_run_folder(data.parent / "checkpoints" / "run", str(data))
    check_output(data.parent / "checkpoints" / "tables.parquet")


def test_a_pipe_or_device_is_neither_written_nor_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        check_output(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        atomic_write(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(ValueError, match="/dev/null"):  # only checked, never written
        check_output(Path("/dev/null"))
