"""One job at a time: who holds a lock is named, and a lock ends with its owner."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.distributed.ranks import joined_ranks, sole_job
from recsys.storage.lock import PATIENCE_SECONDS
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import ranks_of

# Holds the lock in a process of its own, and leaves a child that keeps its files open.
HOLDER = """
import os, sys, time
from pathlib import Path
from recsys.distributed.ranks import sole_job
from recsys.distributed.ranks import joined_ranks
folder = Path(sys.argv[1])
with joined_ranks("cpu") as ranks, sole_job(folder, ranks, folder / ".lock"):
    child = os.fork()
    if not child:
        while not (folder / "end").exists():
            time.sleep(0.01)
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "shop1"}
    argv = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_who_holds_a_folder_is_named_and_its_death_frees_it(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lock = tmp_path / "run", tmp_path / "run" / ".lock"
    try:
        with joined_ranks("cpu") as ranks:
            message = rf"{run}: .*job shop1, process {holder.pid} on {socket.gethostname()} since"
            for name in ("other", "shop1"):  # also of the same job, as long as it lives
                monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
                with pytest.raises(ValueError, match=message), sole_job(run, ranks, lock):
                    pass
            holder.send_signal(signal.SIGSTOP)  # not gone, only silent
            with pytest.raises(ValueError, match=message), sole_job(run, ranks, lock):
                pass
            holder.kill()
            holder.wait()
            # Its child still holds the lock, for a moment longer.
            ender = subprocess.Popen([sys.executable, "-c", f"open('{run}/end', 'w').close()"])
            with sole_job(run, ranks, lock):
                assert ender.wait() == 0
                assert json.loads((run / ".lock.json").read_text())["pid"] == os.getpid()
    finally:
        (run / "end").touch()
        holder.kill()
    assert sorted(path.name for path in run.iterdir()) == ["end"]


def messages(rank: int, world_size: int, folder: Path) -> list[str]:
    """What each rank is refused with: the lock is held, and the folder is a file."""
    ranks, refused = ranks_of(rank, world_size), []
    with sole_job(folder, ranks, folder / ".lock"):
        for target in (folder, folder / ".lock" / "run"):
            try:
                with sole_job(target, ranks, target / ".lock"):
                    pass
            except ValueError as error:
                refused.append(str(error))
    return refused


def test_every_rank_is_refused_with_the_cause(tmp_path: Path) -> None:
    for refused in run_on_ranks(messages, 2, tmp_path / "new" / "run"):
        assert len(refused) == 2
        assert "by process" in refused[0] and ".lock" in refused[1]
    assert not (tmp_path / "new").exists()  # nothing is left of folders made for the lock alone


def test_a_job_of_a_lost_host_is_waited_for_by_its_next_attempt_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock passes at each look at the lock, as the server of its file system sees no end."""
    looks: list[float] = []
    monkeypatch.setattr("recsys.storage.lock.time.monotonic", lambda: 10.0 * len(looks))
    with joined_ranks("cpu") as ranks, sole_job(tmp_path, ranks, tmp_path / ".lock"):
        owner = tmp_path / ".lock.json"
        lost = {**json.loads(owner.read_text()), "host": "node7", "job": "shop1"}
        owner.write_text(json.dumps(lost))
        monkeypatch.setattr("recsys.storage.lock.JobLock._is_free", lambda _: looks.append(0.0))
        for name, count in (("other", 1), ("shop1", 1 + PATIENCE_SECONDS // 10)):
            looks.clear()
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
            with (
                pytest.raises(ValueError, match=r"job shop1, process .* on node7"),
                sole_job(tmp_path, ranks, tmp_path / ".lock"),
            ):
                pass
            assert len(looks) == pytest.approx(count, abs=1)
