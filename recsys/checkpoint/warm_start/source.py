"""The checkpoints that a warm start reads: of the model, and of the state of its optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from recsys.checkpoint.files import (
    BEST,
    check_run_files,
    checked_manifest,
    folders_by_age,
    step_of_folder,
)
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.reader import SafeFileSystemReader
from recsys.checkpoint.run_schema import FILE, load_run_schema
from recsys.checkpoint.stored_tensor import StoredTensor
from recsys.checkpoint.warm_start.request import WarmStart
from recsys.config import Config, config_of_plain
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Stored:
    """A checkpoint that was found whole."""

    folder: Path
    manifest: dict[str, Any]
    reader: SafeFileSystemReader
    metadata: Metadata

    @staticmethod
    def open(folder: Path, ranks: Ranks) -> Stored:
        """Check the files of a checkpoint and read what it has. A collective."""
        manifest = checked_manifest(folder, ranks)
        check_run_files(folder, manifest, ranks)
        with ranks.raise_on_all_ranks():
            reader = SafeFileSystemReader(folder)
            metadata = reader.read_metadata()
        return Stored(folder, manifest, reader, metadata)

    @property
    def entries(self) -> Mapping[str, Any]:
        """Size and type of each tensor by its name."""
        return self.metadata.state_dict_metadata

    @property
    def progress(self) -> Progress:
        """Counters of the run when it was written."""
        return Progress.from_json(self.manifest["progress"])

    def tensor(self, name: str) -> StoredTensor:
        """Return a tensor, to read by rows."""
        return StoredTensor(self.reader, self.metadata, name)


@dataclass(frozen=True)
class Source:
    """The opened run that a warm start takes over from."""

    request: WarmStart
    model: Stored
    optimizer: Stored | None  # with the optimizers' state; None if it is not taken, or not kept
    schema: Schema  # with the run's maps of raw ids
    config: Config


def open_source(request: WarmStart, out: Path, ranks: Ranks) -> Source:
    """Open the checkpoint of a run, for a new run in the folder `out`. A collective.

    The best model has no state of the optimizers with it. It is then that of the checkpoint of the
    same step if the run keeps it, else of its last one.

    Raises:
        ValueError: on every rank: the run has no such checkpoint, it is damaged, or is `out`.
    """
    with ranks.raise_on_all_ranks():
        if request.run.resolve() == out.resolve():
            raise ValueError(f"--warm-start: {request.run} is --out, too; choose another --out")
    checkpoints = request.run / "checkpoints"
    best, steps = checkpoints / BEST, folders_by_age(checkpoints)
    folders = ranks.gather((best if best.is_dir() else None, steps))[0]
    model = folders[0] if request.checkpoint == "best" else next(iter(folders[1]), None)
    if model is None:
        others = [name for name, of in zip(("best", "last"), folders, strict=True) if of]
        fix = f"--warm-start.checkpoint {others[0]}" if others else "the folder of a trained run"
        raise ValueError(f"{request.run}: has no {request.checkpoint} checkpoint; give {fix}")
    opened = Stored.open(model, ranks)
    optimizer = _optimizer(request, opened, folders[1], ranks)
    with ranks.raise_on_all_ranks():
        schema = load_run_schema(request.run)
        if schema is None:
            raise ValueError(
                f"{request.run / FILE}: no such file, as an earlier version trained the run: what "
                "its columns mean is not known; train it again"
            )
        config = config_of_plain(opened.manifest["config"])
    return Source(request, opened, optimizer, schema, config)


def _optimizer(request: WarmStart, model: Stored, steps: list[Path], ranks: Ranks) -> Stored | None:
    """Open the checkpoint with the optimizers' state. A collective."""
    if not request.optimizer or not steps:
        return None
    if model.folder in steps:
        return model
    same = [path for path in steps if step_of_folder(path) == model.manifest["step"]]
    return Stored.open((same or steps)[0], ranks)
