"""Check the output file of a command before the command does any work."""

import os
from collections.abc import Iterable
from pathlib import Path

from recsys.storage.files import regular_file
from recsys.storage.location import Location

# Names of files and folders of runs, packages and datasets that later commands read.
_RUN_FILES = (".job.json", ".lock", "config.yaml", "continual.json", "data.txt", "encoders.json")
_RUN_RESULTS = ("item_counts.npy", "metrics.json", "metrics.jsonl", "plan.txt", "skipped_rows.json")
_PACKAGE_FILES = ("graph.pt2", "manifest.json", "request.json", "schema.yaml")
_RUN_FOLDERS = ("checkpoints", "item_content", "tensorboard", "vocabulary")
_CONTINUAL_FOLDERS = ("partitions", "scores", "tensorboard")
_DATASET_FOLDERS = ("train", "valid", "test", "items", "vocabulary")


def check_output(out: Path, inputs: Iterable[Location] = ()) -> None:
    """Raise a ValueError for an output file that would overwrite `inputs`, a run or a dataset."""
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file, such as {out / 'result'}")
    target = _real(regular_file(out))
    for location in inputs:
        if location.is_local and _real(location.path) in (target, target.parent):
            raise ValueError(f"{out}: is or lies in the input {location}; name a file elsewhere")
    dataset = target.parent.parent
    if target.parent.name in _DATASET_FOLDERS and (dataset / "schema.yaml").exists():
        raise ValueError(f"{out}: would be read as part of {dataset}; name a file elsewhere")
    if (parent := _part_of_run(target.parent)) is not None:
        raise ValueError(f"{out}: lies in {parent}, which is part of a run; name a file elsewhere")
    is_present = target.exists() or target.name.startswith(".")  # a lock may be absent now
    is_result = target.name in (*_RUN_FILES, *_RUN_RESULTS, *_PACKAGE_FILES)
    if is_present and (is_result or target.match("scores_*.parquet")):
        raise ValueError(f"{out}: is part of a run or dataset; name another file")
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, so no folder can be made in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be written to; name a file elsewhere")


def _real(path: Path | str) -> Path:
    """Return the path with links resolved, except a link that leads to itself."""
    return Path(os.path.realpath(path))


def _part_of_run(folder: Path) -> Path | None:
    """Return the subfolder of a run that is `folder` or contains it; None if there is none."""
    for path in (folder, *folder.parents):
        if path.name in _RUN_FOLDERS and (path.parent / ".job.json").exists():
            return path
        if path.name in _CONTINUAL_FOLDERS and (path.parent / "continual.json").exists():
            return path
    return None


def check_run_folder(run: Path, data: str) -> None:
    """Raise a ValueError for a run's folder that overlaps the data or lies in another run."""
    if run.exists() and not run.is_dir():
        raise ValueError(
            f"{run}: is no folder, so no run can be written to it; choose another --out"
        )
    root, folder = Location.of(data), _real(run)
    if (parent := _part_of_run(folder)) is not None:
        raise ValueError(f"{run}: lies in {parent}, which is part of a run; choose another --out")
    data_folders = [root, *(root / name for name in _DATASET_FOLDERS)]
    if root.is_local and folder in [_real(data_folder.path) for data_folder in data_folders]:
        raise ValueError(f"{run}: is part of the dataset {data}; choose another --out")
