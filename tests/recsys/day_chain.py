"""Days of a shop by `prepare events --until` and `continual`, in processes that may be killed.

`python -m tests.recsys.day_chain --kills 20` lives through five days twice: in peace, and with so
many SIGKILLs spread over the commands, each before a random change of a file. Rows, tables of ids,
weights, optimizer state and packages must be equal to the last bit.
"""

import os
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jsonargparse import auto_cli

from recsys.distributed.job import environment_without_rank
from recsys.training.continual import walk
from tests.ranks import HANG_SECONDS, forking_server
from tests.recsys.command_runs import TINY, run_rank, run_recsys
from tests.recsys.data.events.daily_logs import DAYS, content_of
from tests.recsys.data.events.test_events_daily import deliver, log, write_settings
from tests.recsys.training.continual.walk_runs import assert_same_end, files_of

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
COMMANDS = 2  # of a day
WITH_PATHS = {"manifest.json", "items/config.yaml"}  # files of a package that name folders


def commands(folder: Path, day: str) -> list[list[str]]:
    """The words of a day's two commands."""
    data, config = str(folder / "out"), str(folder / "data" / "events.yaml")
    prepare = ["prepare", "events", "--config", config, "--out", data, "--until", day]
    argv = ["continual", "--config", str(TINY), "--data", data, "--out", str(folder / "run")]
    argv += ["--device", "cpu", "--batch_size", "16", "--cache", "cache"]
    argv += ["--content.modalities.text.column", "title", "--continual.keep", "9"]
    return [prepare, [*argv, "--continual.packages", str(folder / "packages")]]


def run_day(
    folder: Path,
    number: int,
    peaceful: Path | None = None,
    kills: int = 0,
    days: int = 5,
    killed: int = 0,
) -> int:
    """Deliver the files of a day and give its commands; return how often any was killed so far.

    `kills` are to come in all `days`, each before some change of a file, of which `peaceful`, the
    folder of a chain without any, has the number. `killed` of them came on earlier days.
    """
    table = log(3, late=True)
    if number == 1:
        write_settings(folder / "data", "last")
        deliver(folder / "data", table, 0)  # no row of the first day is decided on it
    deliver(folder / "data", table, number)
    rng = random.Random(number)
    for index, argv in enumerate(commands(folder, DAYS[number]), COMMANDS * (number - 1)):
        steps = f"steps-{argv[0]}-{number}"
        due = kills * (index + 1) // (COMMANDS * days)
        for attempt in range(due - killed):
            assert peaceful is not None
            last = int((peaceful / steps).read_text()) // (attempt + 1)
            if not run_command(argv, folder, steps, rng.randrange(last)):
                break  # it had less left to do than when it ran first: the next command is killed
            killed += 1
        assert not run_command(argv, folder, steps, None)
    return killed


def run_command(argv: list[str], folder: Path, steps: str, kill_step: int | None) -> bool:
    """Run `recsys` in a process; return whether it was killed."""
    process = forking_server().Process(target=_counted, args=(argv, folder, steps, kill_step))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "output.err").read_text()[-5000:]
    return process.exitcode != 0


def _counted(argv: list[str], folder: Path, steps: str, kill_step: int | None) -> None:
    """`recsys`, which counts the changes of files in the folder, and dies before one of them."""
    number = count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in CHANGES or (
            event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        )
        is_inside = is_change and str(arguments[0]).startswith(f"{folder}/")
        if is_inside and next(number) == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def export(command: list[str], **_: Any) -> Any:  # in a process that has all imports
        return run_recsys(*command[3:], folder=folder, environment=environment_without_rank())

    walk.subprocess = SimpleNamespace(run=export)  # type: ignore[assignment]
    sys.addaudithook(hook)
    try:
        run_rank(argv, {**os.environ, "CXX": "no-compiler"}, folder, folder / "output")
    finally:
        (folder / steps).write_text(str(next(number)))


def packages_of(folder: Path) -> list[Path]:
    return [path for path in sorted((folder / "packages").glob("date=*")) if path.is_dir()]


def assert_same_days(folder: Path, other: Path, packages: Sequence[Path]) -> str:
    """Compare two chains, of which the first had these packages; return what was compared."""
    rows = content_of(folder / "out")
    assert content_of(other / "out") == rows
    tensors, files = assert_same_end(folder / "run", other / "run"), 0
    assert tensors > 0
    for package, other_package in zip(packages, packages_of(other), strict=True):
        one, two = files_of(package), files_of(other_package)
        assert one.keys() == two.keys()
        for name in one.keys() - WITH_PATHS:
            assert one[name] == two[name], name
        files += len(one)
    names = [[path.name for path in sorted((f / "packages").iterdir())] for f in (folder, other)]
    assert names[0] == names[1]
    return f"{len(rows)} folders of rows, {tensors} tensors and {files} files of packages are equal"


def main(kills: int = 20, days: int = 5) -> None:
    """Live through the days in peace and with kills, and compare.

    Args:
        kills: of commands, in all
        days: 1 to 7
    """
    with tempfile.TemporaryDirectory() as name:
        peaceful, killed = Path(name, "peaceful"), Path(name, "killed")
        carried_out = 0
        for folder, number_of_kills in ((peaceful, 0), (killed, kills)):
            folder.mkdir()
            for day in range(1, days + 1):
                carried_out = run_day(folder, day, peaceful, number_of_kills, days, carried_out)
                print(f"{folder.name}: day {day}, {carried_out} killed", flush=True)
        print(assert_same_days(peaceful, killed, packages_of(peaceful)))
        assert carried_out == kills, f"{kills} were to be killed"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
