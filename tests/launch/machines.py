"""Two machines on this one: each a network namespace with its own address and host name.

What runs on them shares this machine's files, as nodes of a cluster share a file system, and
nothing else: a machine that loses its power or its link is lost to the other. It takes root and
the programs `ip` and `unshare`.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.ranks import HANG_SECONDS

# Gives a process the machine's host name and /etc/hosts; both are its own and its children's.
AS_MACHINE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass
class Machine:
    """A namespace `ip netns` knows by `namespace`, with the link `eth0` to the other machine."""

    name: str
    address: str
    namespace: str
    hosts: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The words that run a command on this machine."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        return [*inside, "bash", "-c", AS_MACHINE, "machine", self.name, str(self.hosts), *argv]

    def start(
        self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command in the background; its output goes to the end of `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command(argv), env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        seconds: float = HANG_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            self.command(argv), env=env, capture_output=True, text=True, timeout=seconds
        )

    def lose(self) -> None:
        """Takes its link down, so that nobody hears of its end, and kills all that runs on it."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")
        self.kill_all()

    def come_back(self) -> None:
        """Its link is up again; nothing runs on it."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def kill_all(self) -> None:
        """SIGKILL to every process on it, until there is none."""
        while pids := _ip("netns", "pids", self.namespace).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)
        for process in self.started:
            process.wait()
        self.started.clear()


@contextmanager
def two_machines(folder: Path) -> Iterator[list[Machine]]:
    """Machines `node0` and `node1`; at the end they and all that runs on them are gone."""
    unique = secrets.token_hex(3)
    hosts = folder / "hosts"
    machines = [
        Machine(f"node{number}", f"10.99.0.{number + 1}", f"recsys-{unique}-{number}", hosts)
        for number in range(2)
    ]
    lines = ["127.0.0.1 localhost", *(f"{m.address} {m.name}" for m in machines)]
    hosts.write_text("\n".join(lines) + "\n")
    try:
        for machine in machines:
            _ip("netns", "add", machine.namespace)
        one, two = (["netns", machine.namespace] for machine in machines)
        _ip("link", "add", "eth0", *one, "type", "veth", "peer", "name", "eth0", *two)
        for machine in machines:
            inside = ("-n", machine.namespace)
            _ip(*inside, "address", "add", f"{machine.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip(*inside, "link", "set", link, "up")
        yield machines
    finally:
        existing = _ip("netns", "list").split()
        for machine in machines:
            if machine.namespace in existing:
                machine.kill_all()
                _ip("netns", "delete", machine.namespace)


def why_no_machines(folder: Path) -> str:
    """Why they cannot be had here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if missing := [name for name in ("ip", "unshare") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    try:
        with two_machines(folder) as machines:
            process = machines[0].run(["hostname"])
            return "" if process.stdout.strip() == machines[0].name else process.stderr
    except RuntimeError as error:
        return str(error)


def _ip(*argv: str) -> str:
    process = subprocess.run(["ip", *argv], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"ip {' '.join(argv)}: {process.stderr.strip()}")
    return process.stdout
