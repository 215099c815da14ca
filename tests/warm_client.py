"""Ask the server of `warm_python.py` to run a program, and end as it does.

Arguments: the server's socket, and those of Python.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def open_files() -> list[int]:
    """Return the open files that a program started by this process would have."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    return [number for number in numbers if is_passed_on(number)]


def is_passed_on(number: int) -> bool:
    """Return whether a file is open and stays so in a program."""
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def main() -> None:
    """Connect, send this process's state, pass signals on, and wait for the end."""
    _, address, *words = sys.argv
    files = open_files()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = {
            "words": words,
            "files": files,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        text = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(server, [text], files)
        server.sendall(text[sent:])
        answers = server.makefile()
        pid = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        answer = answers.readline()
    if not answer:
        sys.exit("the server of warm_python.py is gone")
    status = int(answer)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in FORWARDED:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
