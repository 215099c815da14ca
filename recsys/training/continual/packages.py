"""Packages of a continual run: `PACKAGES/NAME` of each partition's model, `NAME.delta` to the next.

A process of its own writes them, as ranks of a job cannot leave their group.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from recsys.checkpoint.partitions import ContinualFolder, RunState, file_name
from recsys.config import ContinualSettings
from recsys.data.schema import Schema
from recsys.distributed.job import environment_of_no_rank
from recsys.serving.delta import write_delta

logger = logging.getLogger(__name__)

NEWEST = "newest"


def check_packages(settings: ContinualSettings, schema: Schema, run: Path) -> None:
    """Refuse bounded vocabularies of items, and a folder inside the run's, before any training."""
    if settings.packages is None:
        return
    if schema.has_bounded_items:
        raise ValueError(
            f"continual.packages is set, but '{schema.target_item}' has a vocabulary of kind "
            "bounded, which a package cannot have; leave it unset, or use kind exact"
        )
    if Path(settings.packages).resolve().is_relative_to(run.resolve()):
        raise ValueError(f"continual.packages {settings.packages}: lies in {run}; name another")


def export_newest(settings: ContinualSettings, folder: ContinualFolder, state: RunState) -> None:
    """Write the package of the partition trained on last, unless it is there. On rank 0."""
    if settings.packages is None or state.last is None:
        return
    names = [file_name(trained.name) for trained in state.trained]
    packages = Path(settings.packages)
    package = packages / names[-1]
    if not package.exists():
        _export(folder.run_of(state.last.name), package, settings.package_tables)
    previous = packages / names[-2] if len(names) > 1 else None
    delta = packages / f"{names[-1]}.delta"
    if previous is not None and previous.exists() and not delta.exists():
        logger.info("%s: %s", delta, write_delta(previous, package, delta))
    link = packages / f".{NEWEST}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(names[-1])
    link.replace(packages / NEWEST)
    for name in names[: -settings.keep]:
        shutil.rmtree(packages / name, ignore_errors=True)


def _export(run: Path, package: Path, tables: str) -> None:
    """Run `recsys export` in a process that is no rank; if it fails, raise a ValueError."""
    package.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recsys.cli", "export", "--run", str(run)]
    command += ["--out", str(package), "--tables", tables]
    command += ["--compile", "false"]  # machine code holds the weights, so each delta would too
    process = subprocess.run(
        command,
        env=environment_of_no_rank(),
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C ends the walk, once the package is whole
    )
    if process.returncode:
        cause = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise ValueError(f"{package}: export of {run} failed: {cause}")
