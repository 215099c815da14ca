"""An interpreter that has the libraries imported: a program begins in it at once.

Each rank that torchrun starts, and torchrun itself, imports torch and TorchRec for seconds before
it does anything. Tests of what such programs do start them by `warm_environment`: its `python`
asks a server, which has imported what programs need and done nothing else, to fork a process for
the program, and ends as that process does. It is a process of its own as any other, with the
arguments, variables, folder and open files of the caller, and gets the signals sent to the caller.
Tests of what starts programs, such as `make train`, use Python itself.

`python -m tests.warm_python SOCKET` runs the server; `warm_client.py` is the other side.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import json
import multiprocessing.spawn
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "python": "",
    "recsys": " -m recsys.cli",
    "torchrun": " -m torch.distributed.run",
    "torchx": " -c 'import sys; from torchx.cli.main import main; main(sys.argv[1:])'",
}
MOST_FILES, LONGEST_REQUEST = 200, 1 << 20
PR_SET_PDEATHSIG = 1  # of prctl(2)
START_SECONDS = 600.0


@functools.cache
def warm_environment() -> dict[str, str]:
    """Variables in which the programs above and the ranks of torchrun begin at once."""
    place = tempfile.TemporaryDirectory(prefix="warm_")
    atexit.register(place.cleanup)
    folder = Path(place.name)
    address = folder / "socket"
    words = [sys.executable, "-m", "tests.warm_python", str(address)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.PIPE)
    atexit.register(server.kill)
    for name, lines in PROGRAMS.items():
        program = folder / name
        client = ROOT / "tests" / "warm_client.py"
        program.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -IS '{client}' '{address}'{lines} \"$@\"\n"
        )
        program.chmod(0o755)
    deadline = time.monotonic() + START_SECONDS
    while not address.exists():
        assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    paths = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    # torchrun starts its ranks with the second.
    return {"PATH": os.pathsep.join(paths), "PYTHON_EXEC": str(folder / "python")}


class Server:
    """Forks a process for each request, and tells the client how it ended."""

    def __init__(self, address: str) -> None:
        """Listen at a socket, which appears once a client may connect to it."""
        self.clients: dict[int, socket.socket] = {}  # by process
        self.selector = selectors.DefaultSelector()
        self.ended, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{address}.new")
        self.listener.listen(100)
        os.rename(f"{address}.new", address)
        for source in (self.listener, self.ended, sys.stdin):  # which ends with the test
            self.selector.register(source, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the process that started this one is gone."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is self.listener:
                    self._begin(self.listener.accept()[0])
                elif key.fileobj is self.ended or key.fd == self.ended:
                    os.read(self.ended, 1000)
                    self._report()
                else:  # the client is gone
                    self.selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _begin(self, client: socket.socket) -> None:
        text, files, _, _ = socket.recv_fds(client, LONGEST_REQUEST, MOST_FILES)
        while not text.endswith(b"\n"):
            text += client.recv(LONGEST_REQUEST)
        request = json.loads(text)
        pid = os.fork()
        if pid == 0:
            become(request, files)
        for file in files:
            os.close(file)
        self.clients[pid] = client
        client.sendall(f"{pid}\n".encode())
        self.selector.register(client, selectors.EVENT_READ, pid)

    def _report(self) -> None:
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            client = self.clients.pop(pid)
            if client in self.selector.get_map():
                self.selector.unregister(client)
                client.sendall(f"{status}\n".encode())
            client.close()


def become(request: dict[str, Any], files: list[int]) -> None:
    """Be the program that is asked for, in the process that was forked for it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ends with the server
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 10 * MOST_FILES) for file in files]
    os.closerange(3, 10 * MOST_FILES)
    for file, number in zip(high, request["files"], strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    code: Any = 1
    try:
        run(request["words"])
        code = 0
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        end(code if isinstance(code, int) else int(code is not None))


def end(code: int) -> None:
    """End this process as Python does, but for freeing what it holds."""
    try:
        threading._shutdown()  # type: ignore[attr-defined] # waits for threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
    finally:
        os._exit(code)


def run(words: list[str]) -> None:
    """Do what `python` does with these words."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    atexit._clear()  # what was registered by the server
    sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)
    multiprocessing.spawn.set_executable(sys.executable)
    while words[0].startswith("-") and words[0] not in ("-m", "-c"):
        option = words.pop(0)
        value = words.pop(0) if option in ("-W", "-X") else ""
        if option == "-W":
            warnings.simplefilter(value)  # type: ignore[arg-type]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    option, *sys.argv = words if words[0] in ("-m", "-c") else ["", *words]
    sys.path[:0] = [str(Path(sys.argv[0]).parent) if not option else os.getcwd(), *paths]
    for path in paths:
        if (hook := Path(path, "sitecustomize.py")).exists():
            runpy.run_path(str(hook))
    if option == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        main = sys.modules["__main__"]
        main.__dict__.update(__spec__=None, __file__=None)
        exec(code, main.__dict__)
    elif option == "-m":
        sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import torchx.cli.main  # noqa: F401

    import tests.preloaded  # noqa: F401

    Server(sys.argv[1]).run()
