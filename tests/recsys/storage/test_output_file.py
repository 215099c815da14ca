"""No command writes over what it reads, nor beside it where it would be read next time."""

import os
from pathlib import Path

import pytest

from recsys.storage.files import write_whole
from recsys.storage.location import Location
from recsys.storage.output_file import check_output, check_run_folder


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
        write_whole(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(ValueError, match="/dev/null"):  # only checked, never written
        check_output(Path("/dev/null"))
