"""The request of a warm start, the checkpoints that it reads, and their differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from torch.distributed.checkpoint.metadata import Metadata

from recsys.checkpoint.files import (
    BEST,
    check_run_files,
    checked_manifest,
    folders_by_age,
    step_of_folder,
)
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.reader import SafeFileSystemReader, StoredTensor
from recsys.checkpoint.run_schema import load_run_schema
from recsys.config import Config, config_of_plain
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks

MOST_FAULTS = 12  # in one message


@dataclass(frozen=True)
class WarmStart:
    """A run to start from, and which of its state is taken over.

    Args:
        run: folder of the run.
        checkpoint: its best model or its last checkpoint.
        only: load only parameters that match these patterns, such as `content.*`; empty: all.
        skip: reinitialise parameters that match these patterns. What belongs to a parameter goes
            with it: the state of its optimizer, and a table's vocabulary.
        optimizer: also take the state of the optimizers.
    """

    run: Path
    checkpoint: Literal["best", "last"] = "best"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    optimizer: bool = True

    def takes(self, name: str) -> bool:
        is_included = not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)
        return is_included and not any(fnmatchcase(name, pattern) for pattern in self.skip)

    def unmatched(self, names: list[str]) -> list[str]:
        return [
            pattern
            for pattern in dict.fromkeys([*self.only, *self.skip])
            if not any(fnmatchcase(name, pattern) for name in names)
        ]


@dataclass(frozen=True)
class Difference:
    """One difference: of which part, what it is, and what the new run has."""

    part: str
    what: str
    rule: str


@dataclass
class Differences:
    """Differences that a rule reconciles, and faults: those that none does."""

    reconciled: list[Difference] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, part: str, what: str, rule: str) -> None:
        self.reconciled.append(Difference(part, what, rule))

    def refuse(self, part: str, what: str, fix: str) -> None:
        """Add a difference that cannot be reconciled, with what would help."""
        self.faults.append(f"{part}: {what}; {fix}")

    def check(self, folder: object) -> None:
        """Raise a ValueError that lists the faults, if there are any."""
        if self.faults:
            listed = self.faults[:MOST_FAULTS]
            if num_unlisted := len(self.faults) - len(listed):
                listed.append(f"and {num_unlisted} more")
            raise ValueError(f"{folder}: this model cannot start from it: {'. '.join(listed)}")

    def __str__(self) -> str:
        if not self.reconciled:
            return "nothing differs"
        rows = [("part", "difference", "in this run")]
        rows += [(row.part, row.what, row.rule) for row in self.reconciled]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(
            f"{part:<{widths[0]}}  {what:<{widths[1]}}  {rule}" for part, what, rule in rows
        )


@dataclass(frozen=True, eq=False)
class StoredState:
    """A checkpoint whose files are complete and unchanged."""

    folder: Path
    manifest: dict[str, Any]
    reader: SafeFileSystemReader
    metadata: Metadata

    @staticmethod
    def open(folder: Path, ranks: Ranks) -> StoredState:
        """Check the files of a checkpoint and read what it has. A collective."""
        manifest = checked_manifest(folder, ranks)
        check_run_files(folder, manifest, ranks)
        with ranks.raise_on_all_ranks():
            reader = SafeFileSystemReader(folder)
            return StoredState(folder, manifest, reader, reader.read_metadata())

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def entries(self) -> Mapping[str, Any]:
        return self.metadata.state_dict_metadata

    @property
    def progress(self) -> Progress:
        return Progress.from_json(self.manifest["progress"])

    def tensor(self, name: str) -> StoredTensor:
        return StoredTensor(self.reader, self.metadata, name)


@dataclass(frozen=True)
class Source:
    """The opened run that a warm start takes over from."""

    request: WarmStart
    model: StoredState
    optimizer: StoredState | None  # with the optimizers' state; None if not taken, or not kept
    schema: Schema  # with the run's maps of raw ids
    config: Config


def open_source(request: WarmStart, out: Path | None, ranks: Ranks) -> Source:
    """Open the checkpoint of a run, for a new run in the folder `out`, if any. A collective.

    The best model takes optimizer state from the checkpoint of its step, or else the last one. A
    missing or damaged checkpoint, or the folder `out` itself, is a ValueError on every rank.
    """
    with ranks.raise_on_all_ranks():
        if out is not None and request.run.resolve() == out.resolve():
            raise ValueError(f"--warm-start: {request.run} is --out, too; choose another --out")
    checkpoints = request.run / "checkpoints"
    best, steps = checkpoints / BEST, folders_by_age(checkpoints)
    best, steps = ranks.gather((best if best.is_dir() else None, steps))[0]
    folder = best if request.checkpoint == "best" else next(iter(steps), None)
    if folder is None:
        other = "best" if best else "last" if steps else None
        fix = f"--warm-start.checkpoint {other}" if other else "the folder of a trained run"
        raise ValueError(f"{request.run}: has no {request.checkpoint} checkpoint; give {fix}")
    model = StoredState.open(folder, ranks)
    optimizer: StoredState | None = model
    if not request.optimizer or not steps:
        optimizer = None
    elif folder not in steps:
        same_step = [path for path in steps if step_of_folder(path) == model.step]
        optimizer = StoredState.open((same_step or steps)[0], ranks)
    with ranks.raise_on_all_ranks():
        schema = load_run_schema(request.run)
        config = config_of_plain(model.manifest["config"])
    return Source(request, model, optimizer, schema, config)
