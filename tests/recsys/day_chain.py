"""Days of a shop by `prepare events --until` and `continual`, in processes that may be killed."""

from __future__ import annotations

import os
import random
import signal
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recsys.distributed.job import environment_of_no_rank
from recsys.training.continual import walk
from tests.ranks import HANG_SECONDS, forking_server
from tests.recsys.command_runs import TINY, run_rank, run_recsys
from tests.recsys.data.events.test_events_daily import DAYS, deliver, log, write_settings

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
KILLS = 1  # of each command of a day; with 2 the days take a third longer


def commands(folder: Path, day: str) -> list[list[str]]:
    """The words of a day's two commands."""
    data, config = str(folder / "out"), str(folder / "data" / "events.yaml")
    prepare = ["prepare", "events", "--config", config, "--out", data, "--until", day]
    words = ["continual", "--config", str(TINY), "--data", data, "--out", str(folder / "run")]
    words += ["--device", "cpu", "--batch_size", "16", "--cache", "cache"]
    words += ["--content.modalities.text.column", "title", "--continual.keep", "9"]
    return [prepare, [*words, "--continual.packages", str(folder / "packages")]]


def run_day(folder: Path, number: int, peaceful: Path | None = None) -> int:
    """Deliver the files of a day and give its commands; return how often they were killed.

    They are killed if `peaceful` is the folder of a chain that was not, each before some change of
    its files.
    """
    table = log(3, late=True)
    if number == 1:
        write_settings(folder / "data", "last")
        deliver(folder / "data", table, 0)  # no row of the first day is decided on it
    deliver(folder / "data", table, number)
    killed, rng = 0, random.Random(number)
    for words in commands(folder, DAYS[number]):
        steps = f"steps-{words[0]}-{number}"
        for attempt in range(KILLS if peaceful else 0):
            assert peaceful is not None
            last = int((peaceful / steps).read_text()) // (attempt + 1)
            killed += run_command(words, folder, steps, rng.randrange(last))
        assert not run_command(words, folder, steps, None)
    return killed


def run_command(words: list[str], folder: Path, steps: str, kill_at: int | None) -> bool:
    """Run `recsys` in a process; return whether it was killed."""
    process = forking_server().Process(target=_counted, args=(words, folder, steps, kill_at))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "output.err").read_text()[-5000:]
    return process.exitcode != 0


def _counted(words: list[str], folder: Path, steps: str, kill_at: int | None) -> None:
    """`recsys`, which counts the changes of files in the folder, and dies before one of them."""
    number = count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in CHANGES or (
            event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        )
        is_inside = is_change and str(arguments[0]).startswith(f"{folder}/")
        if is_inside and next(number) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def export(command: list[str], **_: Any) -> Any:  # in a process that has all imports
        return run_recsys(*command[3:], folder=folder, environment=environment_of_no_rank())

    walk.subprocess = SimpleNamespace(run=export)  # type: ignore[assignment]
    sys.addaudithook(hook)
    try:
        run_rank(words, {**os.environ, "CXX": "no-compiler"}, folder, folder / "output")
    finally:
        (folder / steps).write_text(str(next(number)))
