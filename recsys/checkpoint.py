"""The best model of a run on disk, by torch.distributed.checkpoint.

What trains is stored, and what training changed: tables, dense weights, adapters, normalisation
statistics and the memory bank. The frozen weights of encoders are not; the configuration names
where they come from. Shards are loaded into whatever plan and number of ranks reads them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from recsys.build import Job

BEST = "best"


def _state(job: Job) -> dict[str, Any]:
    """Name -> tensor, sharing memory with the model."""
    frozen = {name for name, value in job.em3.named_parameters() if not value.requires_grad}
    frozen_encoders = tuple(
        f"content.encoders.{name}."
        for name, encoder in (job.em3.content.encoders.items() if job.em3.content else ())
        if getattr(encoder, "caches", True)
    )
    trained = {name for name, value in job.em3.named_parameters() if value.requires_grad}
    state: dict[str, Any] = {
        f"model.{name}": value
        for name, value in job.model.state_dict().items()
        if name in trained or not (name in frozen or name.startswith(frozen_encoders))
    }
    if job.em3.content is not None and job.em3.content.bank is not None:
        state["bank"] = job.em3.content.bank.state_dict()["pool"]
    return state


def save_best(job: Job, run: Path) -> None:
    """Writes `RUN/checkpoints/best`: the old one stays until the new one is whole. A collective."""
    folder = run / "checkpoints" / BEST
    partial = folder.with_name(f".{BEST}.partial")
    with job.ranks.all_or_none():
        if job.ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
    with job.ranks.all_or_none():
        dcp.save(_state(job), checkpoint_id=partial)
    with job.ranks.all_or_none():
        if job.ranks.is_first:
            old = _set_aside(folder)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Where the old checkpoint stands while the new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


@torch.no_grad()
def load_best(job: Job, run: Path) -> None:
    """Loads `RUN/checkpoints/best` into the model and the bank, in place. A collective.

    Raises:
        ValueError: there is none, or it is of another model.
    """
    folder = run / "checkpoints" / BEST
    with job.ranks.all_or_none():
        # A job that was killed between the two renames of `save_best`.
        if job.ranks.is_first and not folder.exists() and _set_aside(folder).exists():
            _set_aside(folder).rename(folder)
    with job.ranks.all_or_none():
        if not (folder / ".metadata").is_file():
            raise ValueError(f"{folder}: no checkpoint; train with `--out {run}` first")
        state = _state(job)
        try:
            stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            if differing := sorted(stored.keys() ^ state.keys()):
                raise ValueError(
                    f"{len(differing)} tensors are in one only, such as {differing[0]}"
                )
            dcp.load(state, checkpoint_id=folder)
        except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{folder}: the checkpoint does not fit the model of {run}/config.yaml: {error}"
            ) from error
    weights = {
        name.removeprefix("model."): value
        for name, value in state.items()
        if name.startswith("model.")
    }
    job.model.load_state_dict(weights, strict=False)
