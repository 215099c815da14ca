"""Environments of peers: one per list of requirements, installed from the package index once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

DONE = "installed.txt"  # written last


def python_with(requirements: tuple[str, ...], folder: Path) -> Path:
    """Return the interpreter of an environment with these packages; make it if it is missing.

    Raises:
        RuntimeError: a package cannot be installed; names the log.
    """
    names = "\n".join([sys.version, *requirements])
    place = folder / hashlib.sha256(names.encode()).hexdigest()[:12]
    python, done = place / "venv" / "bin" / "python", place / DONE
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        if done.exists():
            return python
        log = place / "log.txt"
        with log.open("w") as output:
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(place / "venv")],
                [str(python), "-m", "pip", "install", *requirements],
            ):
                if subprocess.run(command, stdout=output, stderr=output).returncode:
                    raise RuntimeError(f"{' '.join(requirements)} cannot be installed; see {log}")
        done.write_text(names)
    return python
