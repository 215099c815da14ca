"""On the path of a job under test, this notes every step a rank makes and kills ranks as planned.

Python imports it at start. TRACE names a folder with an optional `plan.json`, a list of [step,
rank, signal, seconds]: each is carried out once, so many seconds after that rank has made that
step, however often the job restarts. `steps-RANK.jsonl` gets one line per step made.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

WATCHED = "recsys.training.trainer"


class _Finder(importlib.abc.MetaPathFinder):
    """Changes `LossWatch.step`, which the training loop calls after each step, as it is loaded."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            watch_steps(module.LossWatch)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def watch_steps(loss_watch: Any) -> None:
    """Notes each step, and does what is planned after it."""
    folder, rank = Path(os.environ["TRACE"]), int(os.environ.get("RANK", "0"))
    plan = folder / "plan.json"
    planned = json.loads(plan.read_text()) if plan.exists() else []
    step_before = loss_watch.step

    def step(self: Any, number: int, loss: Any, positions: Any) -> Any:
        with (folder / f"steps-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([number, float(loss), positions.tolist()]) + "\n")
        for planned_step, who, signal, seconds in planned:
            marker = folder / f"done-{planned_step}-{who}-{signal}"
            if (planned_step, who) == (number, rank) and not marker.exists():
                marker.touch()
                threading.Timer(seconds, os.kill, (os.getpid(), signal)).start()
        return step_before(self, number, loss, positions)

    loss_watch.step = step


if os.environ.get("TRACE"):
    if WATCHED in sys.modules:  # where the interpreter had it imported before
        watch_steps(sys.modules[WATCHED].LossWatch)
    else:
        sys.meta_path.insert(0, _Finder())
