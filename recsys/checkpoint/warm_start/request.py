"""Request of a warm start: the run, its checkpoint, and the parts to take over."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

Checkpoint = Literal["best", "last"]


@dataclass(frozen=True)
class WarmStart:
    """A run to start from, and which of its state is taken over.

    Args:
        run: folder of the run.
        checkpoint: its best model or its last checkpoint.
        only: patterns of parameters, such as `content.*`, that alone are taken; empty: all.
        skip: patterns of parameters that begin anew. What belongs to a parameter goes with it: the
            state of its optimizer, and a table's vocabulary.
        optimizer: also take the state of the optimizers.

    Example::

        WarmStart(Path("runs/monday"), skip=("ranking.*",))
    """

    run: Path
    checkpoint: Checkpoint = "best"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    optimizer: bool = True

    def takes(self, name: str) -> bool:
        """Return whether a parameter is asked for."""
        chosen = not self.only or any(fnmatchcase(name, each) for each in self.only)
        return chosen and not any(fnmatchcase(name, each) for each in self.skip)

    def unmatched(self, names: list[str]) -> list[str]:
        """Return the patterns that match none of the parameters."""
        patterns = dict.fromkeys([*self.only, *self.skip])
        return [each for each in patterns if not any(fnmatchcase(name, each) for name in names)]
