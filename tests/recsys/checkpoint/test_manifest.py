"""A manifest that is not as it was written is damage: the checkpoint before it is used, or none."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from recsys.build import Job, build_job
from recsys.checkpoint.compatibility import check_config
from recsys.checkpoint.files import folder_of_step, folders_by_age
from recsys.checkpoint.manager import Checkpoints, logger
from recsys.checkpoint.manifest import read_manifest
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_folder import read_item_counts
from recsys.config import to_plain
from recsys.data.parquet.order import Stage
from recsys.distributed.ranks import joined_ranks
from tests.datasets import write_dataset
from tests.recsys.checkpoint.stopped_runs import config_of

BEFORE = Progress(steps=3, dense_steps=3, batches=3)
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
    for progress in (BEFORE, NEWEST):
        checkpoints.save(copy.deepcopy(progress), wait=True)
    checkpoints.close()
    return run


def restored(job: Job, run: Path) -> Progress | None:
    checkpoints = Checkpoints(job, run, "data")
    try:
        return checkpoints.restore()
    finally:
        checkpoints.close()


def manifest_of(run: Path) -> Path:
    return folder_of_step(run / "checkpoints", NEWEST.steps) / "checkpoint.json"


def of_format_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it was written before it had a checksum."""
    return {**{key: manifest[key] for key in manifest if key != "checksum"}, "format": 1}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


DAMAGES: dict[str, Any] = {
    "no files": {"files": None},
    "files empty": {"files": {}},
    "files of text": {"files": {".metadata": ["7", "8"]}},
    "files a list": {"files": []},
    "no progress": {"progress": None},
    "progress a list": {"progress": [1]},
    "progress empty": {"progress": {}},
    "progress of text": {"progress": {**asdict(NEWEST), "steps": "6"}},
    "progress of more": {"progress": {**asdict(NEWEST), "colour": 1}},
    "stages of text": {"progress": {**asdict(NEWEST), "stages": ["one"]}},
    "ids of text": {"progress": {**asdict(NEWEST), "ids": {"user": 3}}},
    "no config": {"config": None},
    "config empty": {"config": {}},
    "no ranks": {"world_size": 0},
    "data a number": {"data": 7},
    "items a number": {"items": 7},
    "another format": {"format": 9},
}


def damage(path: Path, name: str) -> None:
    """Write a manifest of format 1, which has no checksum, with a damage."""
    manifest = of_format_1(json.loads(path.read_text())) | DAMAGES.get(name, {})
    text = json.dumps({key: value for key, value in manifest.items() if value is not None})
    path.write_text({"deep nesting": nested(50_000), "a list": "[]"}.get(name, text))


@pytest.mark.parametrize("name", [*DAMAGES, "a list"])
def test_a_manifest_with_an_entry_missing_or_of_another_type_is_damaged(
    saved: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(manifest_of(saved), tmp_path)
    damage(tmp_path / "checkpoint.json", name)
    with pytest.raises(ValueError, match=r"checkpoint.json: damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["no files", "no progress", "deep nesting"])
def test_a_damaged_manifest_is_named_in_one_warning_and_the_checkpoint_before_used(
    job: Job, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *words: warnings.append(text % words))
    run = shutil.copytree(saved, tmp_path / "run")
    damage(manifest_of(run), name)
    assert restored(job, run) == BEFORE
    assert len(warnings) == 1 and str(manifest_of(run)) in warnings[0]


def test_a_manifest_without_checksum_of_its_own_still_loads(
    job: Job, saved: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    for folder in folders_by_age(run / "checkpoints"):
        path = folder / "checkpoint.json"
        path.write_text(json.dumps(of_format_1(json.loads(path.read_text()))))
    assert restored(job, run) == NEWEST


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a tree of JSON, but not of the whole."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


COUNT_DAMAGES = ("longer", "floats", "three", "falling", "below zero", "cut", "missing")


@pytest.mark.parametrize("change", COUNT_DAMAGES)
def test_counts_of_items_that_are_not_those_of_the_run_are_refused(
    tmp_path: Path, change: str
) -> None:
    file, counts = tmp_path / "item_counts.npy", np.arange(30)
    np.save(file, counts)
    assert read_item_counts(tmp_path, 30).of(np.arange(30)).tolist() == counts.tolist()
    if change == "missing":
        file.unlink()
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        damaged = {
            "longer": np.arange(31),
            "floats": counts / 2,
            "three": np.ones((3, 2), int),
            "falling": np.array([[9, 4], [1, 1]]),
            "below zero": np.array([[4, 9], [1, -1]]),
        }
        np.save(file, damaged[change])
    with pytest.raises(ValueError, match=r"item_counts\.npy"):
        read_item_counts(tmp_path, 30)


leaves = some.none() | some.booleans() | some.integers() | some.floats() | some.text()
values = some.recursive(
    leaves, lambda part: some.lists(part) | some.dictionaries(some.text(), part), max_leaves=4
)


@some.composite
def mutations(draw: some.DrawFn) -> Any:
    """A change of a manifest's text."""
    number = draw(some.integers(0, 10**6))  # of the place; manifests have about 200
    way = draw(some.sampled_from(["replace", "remove", "add", "cut", "byte", "nest"]))
    value = draw(values)

    def change(text: str) -> str:
        if way == "cut":
            return text[: number % len(text)]
        if way == "byte":
            place = number % len(text)
            return text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        tree = json.loads(text)
        paths = list(places(tree))
        *path, last = paths[number % len(paths)]
        parent = tree
        for key in path:
            parent = parent[key]
        if way == "remove":
            del parent[last]
        elif way == "replace":
            parent[last] = value
        elif way == "add" and isinstance(parent, dict):
            parent[f"{last}_"] = value
        elif way == "nest":
            parent[last] = "NESTED"
            return json.dumps(tree).replace('"NESTED"', nested(1 + number % 2000))
        return json.dumps(tree)

    return change


SWEEP = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@settings(SWEEP, max_examples=300)
@given(change=mutations(), number=some.sampled_from([1, 2]))
def test_whatever_changes_in_a_manifest_it_reads_as_written_or_is_damaged(
    saved: Path, tmp_path: Path, change: Any, number: int
) -> None:
    written = json.loads(manifest_of(saved).read_text())
    text = json.dumps(written if number == 2 else of_format_1(written))
    (tmp_path / "checkpoint.json").write_text(change(text))
    try:
        manifest = read_manifest(tmp_path)
    except ValueError:
        return
    if number == 2:
        assert manifest == written
    Progress.from_json(manifest["progress"])


@settings(SWEEP, max_examples=25)
@given(change=mutations())
def test_whatever_changes_in_the_configuration_of_a_manifest_it_fits_or_is_refused(
    job: Job, change: Any
) -> None:
    try:
        stored = json.loads(change(json.dumps(to_plain(job.config))))
    except (ValueError, RecursionError):  # the manifest is damaged
        return
    with contextlib.suppress(ValueError):
        check_config(stored, job.config, "checkpoint")


@pytest.mark.parametrize("section", [None, [], "din_dcn", {"name": None}, {"name": ["din"]}])
def test_a_ranking_section_of_another_kind_is_refused_by_name(job: Job, section: Any) -> None:
    stored = {**to_plain(job.config), "ranking": section}
    with pytest.raises(ValueError, match="ranking"):
        check_config(stored, job.config, "checkpoint")
