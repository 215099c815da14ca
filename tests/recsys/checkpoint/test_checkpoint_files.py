"""A checkpoint that is not as it was written is damage: the one before it is used, or none."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from recsys.build import Job, build_job
from recsys.checkpoint.files import MANIFEST, folder_of_step
from recsys.checkpoint.manager import Checkpoints, logger
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_folder import read_item_counts
from recsys.data.row_source import Stage
from recsys.distributed.ranks import joined_ranks
from tests.datasets import write_dataset
from tests.recsys.checkpoint.stopped_runs import config_of

PREVIOUS = Progress(steps=3, dense_steps=3, batches=3)
NEWEST = Progress(
    steps=6,
    dense_steps=6,
    samples=96,
    seconds=0.25,
    epoch=1,
    stages=[Stage(2, 8, 1)],
    batches=1,
    best_step=3,
    best_score=0.5,
    best={"auc": 0.5, "cold": {"auc": None}},
    ids={"user": {"ids": 9, "unknown": 1}},
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("manifest")
    data = write_dataset(folder / "data")
    with joined_ranks("cpu") as ranks:
        yield build_job(config_of(folder, "--content", "none"), str(data), ranks)


@pytest.fixture(scope="module")
def saved(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    run = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(job, run, "data")
    for progress in (PREVIOUS, NEWEST):
        checkpoints.save(copy.deepcopy(progress), wait=True)
    checkpoints.close()
    return run


def restored(job: Job, run: Path) -> Progress | None:
    checkpoints = Checkpoints(job, run, "data")
    try:
        return checkpoints.restore()
    finally:
        checkpoints.close()


def newest_of(run: Path) -> Path:
    return folder_of_step(run / "checkpoints", NEWEST.steps)


def nest_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 50_000 + "]" * 50_000)


def change_step(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"step": 7}))


def flip_shard_bit(folder: Path) -> None:
    (shard,) = folder.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)


def remove_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        nest_manifest,
        change_step,
        flip_shard_bit,
        remove_metadata,
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_warning_and_the_one_before_it_used(
    job: Job,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: warnings.append(text % values))
    run = shutil.copytree(saved, tmp_path / "run")
    damage(newest_of(run))
    assert restored(job, run) == PREVIOUS
    assert len(warnings) == 1 and str(newest_of(run)) in warnings[0]


@pytest.mark.parametrize("change", ["longer", "falling", "below zero", "cut", "missing"])
def test_counts_of_items_that_are_not_those_of_the_run_are_refused(
    tmp_path: Path, change: str
) -> None:
    file, counts = tmp_path / "item_counts.npy", np.arange(30)
    np.save(file, np.stack([counts, counts]))
    assert read_item_counts(tmp_path, 30).of(np.arange(30)).tolist() == counts.tolist()
    if change == "missing":
        file.unlink()
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        damaged = {
            "longer": np.stack([np.arange(31)] * 2),
            "falling": np.array([[9, 4], [1, 1]]),
            "below zero": np.array([[4, 9], [1, -1]]),
        }
        np.save(file, damaged[change])
    with pytest.raises(ValueError, match=r"item_counts\.npy"):
        read_item_counts(tmp_path, 30)
