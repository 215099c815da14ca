"""`prepare events --follow`: files that arrive while it runs, and while it is killed."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from recsys.data.events import follow
from recsys.data.events.daily import prepare_days
from recsys.data.events.daily_state import PROGRESS, STATE
from recsys.data.events.times import Calendar, moment
from recsys.storage.files import atomic_write, read_json
from tests.ranks import HANG_SECONDS, forking_server
from tests.recsys.command_runs import run_rank
from tests.recsys.data.events.daily_logs import DAYS, add_file, content_of, write_small
from tests.recsys.data.events.test_events_daily import deliver, log, write_settings

HOURS = Calendar("Europe/Berlin", "hour")


def _follow(config: Path, out: Path, clock: Path) -> None:
    follow.now = lambda: int(clock.read_text())  # type: ignore[assignment]
    argv = ["prepare", "events", "--config", str(config), "--out", str(out), "--follow", "0.05"]
    run_rank(argv, dict(os.environ), out.parent, out.parent / "output")


@dataclass
class Follower:
    """A process that follows the files of a folder by a clock of its own."""

    folder: Path
    config: Path

    def start(self) -> ForkServerProcess:
        paths = self.config, self.folder / "out", self.folder / "clock"
        process = forking_server().Process(target=_follow, args=paths)
        process.start()
        return process

    def end_day(self, number: int) -> None:
        atomic_write(self.folder / "clock", str(moment(DAYS[number + 1], "UTC")))

    def has_prepared(self, number: int) -> bool:
        file = self.folder / "out" / STATE / PROGRESS
        return file.exists() and read_json(file)["day"] == f"{DAYS[number]}/hour=23"

    def is_writing(self) -> bool:
        return any((self.folder / "out").glob("..ready.*.partial"))

    def wait(
        self, process: ForkServerProcess, is_there: Callable[..., bool], *arguments: int
    ) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not is_there(*arguments):
            assert process.is_alive(), (self.folder / "output.err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.mark.long
def test_files_that_arrive_as_it_runs_ends_and_is_killed_make_the_hours_of_one_call(
    tmp_path: Path,
) -> None:
    config, table = write_settings(tmp_path / "data", "last"), log(4, late=True)
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"partition": "hour"}, sort_keys=False))
    follower = Follower(tmp_path, config)
    follower.end_day(0)
    deliver(tmp_path / "data", table, 0)
    process = follower.start()
    follower.wait(process, follower.has_prepared, 0)
    for day, number in ((1, None), (2, signal.SIGTERM), (3, signal.SIGKILL)):
        deliver(tmp_path / "data", table, day)
        follower.end_day(day)
        if number is not None:
            follower.wait(process, follower.is_writing)
            os.kill(process.pid or 0, number)
            process.join(HANG_SECONDS)
            assert process.exitcode == (0 if number == signal.SIGTERM else -number)
            assert follower.is_writing() == (number == signal.SIGKILL)
            process = follower.start()
        follower.wait(process, follower.has_prepared, day)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(HANG_SECONDS)
    assert process.exitcode == 0
    prepare_days(config, tmp_path / "once", DAYS[3])
    content = content_of(tmp_path / "once")
    assert content_of(tmp_path / "out") == content
    assert len([name for name in content if "/hour=" in name]) > 24


def test_only_new_files_make_a_period_and_events_of_one_that_goes_on_wait(tmp_path: Path) -> None:
    config, out = write_small(tmp_path, partition="hour"), tmp_path / "out"
    assert prepare_days(config, out, f"{DAYS[0]}/05", after_new_files=True) is not None
    assert prepare_days(config, out, f"{DAYS[0]}/09", after_new_files=True) is None
    add_file(tmp_path / "log" / "1.parquet", [("ann", 3, 7 * 3600)])
    report = prepare_days(config, out, f"{DAYS[0]}/20", after_new_files=True)
    # within: 12h
    assert report is not None and list(report["days"]) == [f"{DAYS[0]}/hour={h}" for h in (13, 19)]


def test_new_files_of_an_object_store_that_keeps_listings_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings: dict[str, Any] = {}
    list_folder = MemoryFileSystem.ls

    def list_once(self: MemoryFileSystem, path: str, detail: bool = True, **_: Any) -> Any:
        return listings.setdefault(f"{path}, {detail}", list_folder(self, path, detail))

    monkeypatch.setattr(MemoryFileSystem, "ls", list_once)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: listings.clear())
    store, out = MemoryFileSystem(), tmp_path / "out"
    url = f"memory://{tmp_path.name}"
    tables = {"view": {"path": f"{url}/log"}, "buy": {"path": f"{url}/buys"}}
    config = write_small(tmp_path, events=tables)
    store.put(f"{tmp_path}/buys/0.parquet", f"{url}/buys/0.parquet")
    assert prepare_days(config, out, DAYS[0], after_new_files=True) is None  # no views yet
    store.put(f"{tmp_path}/log/0.parquet", f"{url}/log/0.parquet")
    assert prepare_days(config, out, DAYS[0], after_new_files=True) is not None
    assert prepare_days(config, out, DAYS[1], after_new_files=True) is None
    store.put(f"{tmp_path}/log/0.parquet", f"{url}/log/1.parquet")
    report = prepare_days(config, out, DAYS[1], after_new_files=True)
    assert report is not None and report["left_out"]["duplicate"] == 2


def test_ids_of_another_type_than_in_the_calls_before_name_their_column(tmp_path: Path) -> None:
    items = {"path": "items.parquet", "id": "item", "columns": {"brand": "id"}}
    config, out = write_small(tmp_path, items=items), tmp_path / "out"
    pq.write_table(pa.table({"item": [1, 2], "brand": ["a", "b"]}), tmp_path / "items.parquet")
    prepare_days(config, out, DAYS[0])
    pq.write_table(pa.table({"item": [1, 2], "brand": [7, 8]}), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=r"column 'brand': the map holds strings, .* int64"):
        prepare_days(config, out, DAYS[1])


def test_ids_that_had_no_value_and_no_type_in_the_first_call_are_strings(tmp_path: Path) -> None:
    tables = {"view": {"path": "log", "columns": ["shop"]}, "buy": {"path": "buys"}}
    config = write_small(tmp_path, events=tables, context={"shop": "id"})
    files = [tmp_path / "log" / f"{number}.parquet" for number in (0, 1)]
    for file, shops in zip(files, (pa.nulls(2), pa.array([7, 7])), strict=True):
        pq.write_table(
            pq.read_table(tmp_path / "buys/0.parquet").append_column("shop", shops), file
        )
        if file == files[0]:
            prepare_days(config, tmp_path / "out", DAYS[0])
    with pytest.raises(ValueError, match=r"1.parquet: column 'shop' .* string in .* earlier call"):
        prepare_days(config, tmp_path / "out", DAYS[1])


def test_files_that_were_read_may_be_removed_while_they_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, file = write_small(tmp_path), tmp_path / "out", tmp_path / "log" / "0.parquet"
    prepare_days(config, out, DAYS[0])
    list_folder = LocalFileSystem.ls

    def list_once(self: LocalFileSystem, path: str, **options: Any) -> Any:
        entries = list_folder(self, path, **options)
        if path == str(file.parent):
            file.unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(LocalFileSystem, "ls", list_once)
    assert prepare_days(config, out, DAYS[1], after_new_files=True) is None
    assert not file.exists()


def test_a_folder_without_files_is_waited_for(tmp_path: Path) -> None:
    config, out = write_small(tmp_path), tmp_path / "out"
    for file in tmp_path.glob("buys/*"):
        file.unlink()
    assert prepare_days(config, out, DAYS[0], after_new_files=True) is None


@pytest.mark.parametrize(("day", "hours"), [("2026-03-29", 23), ("2026-10-25", 25)])
def test_a_day_has_the_hours_since_it_began(day: str, hours: int) -> None:
    names = [f"{day}/hour={hour:02}" for hour in range(hours)]
    end = HOURS.end_of(day)
    assert [HOURS.end_of(name) for name in names][-1] == end
    assert [HOURS.last_ended(HOURS.end_of(name)) for name in names] == names
    assert HOURS.last_ended(end - 1) == names[-2]
    with pytest.raises(ValueError, match="no date; write such as 2026-11-01 or 2026-11-01/05"):
        HOURS.end_of(f"{day}/{hours}")


def test_the_last_hour_may_be_before_a_day_that_the_zone_skipped() -> None:
    hours = Calendar("Pacific/Apia", "hour")
    assert hours.last_ended(hours.end_of("2011-12-29")) == "2011-12-29/hour=23"


def test_a_signal_whose_exception_a_library_swallows_ends_the_command_after_its_call() -> None:
    calls: list[Any] = []

    def prepare(**options: Any) -> None:
        calls.append(options)
        assert len(calls) == 1
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)

    follow.follow_files(HOURS, 0.01, prepare, pytest.fail)
    assert len(calls) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
