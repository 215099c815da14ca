"""A Slurm cluster of two machines on this one, from Debian's slurm-wlm: started and torn down.

`python -m tests.launch.slurm_cluster COMMAND ...` runs a command on its first machine, as on a
login node. Configuration, logs and state lie in a temporary folder; there is no accounting, so
`sacct` knows nothing and a job that `squeue` no longer lists has ended.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launch.machines import Machine, two_machines, why_no_machines
from tests.ranks import HANG_SECONDS

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONFIGURATION = """\
ClusterName=two
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits as long as credentials live.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
# Without control groups: processes are tracked by their parents, tasks bound to their cores.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1
# What the machines are said to have is believed; the GPUs stand for real ones.
GresTypes=gpu
NodeName={first.name} NodeAddr={first.address} CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName={second.name} NodeAddr={second.address} CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
CONTROL_GROUPS = "CgroupPlugin=disabled\n"


@dataclass
class SlurmCluster:
    """A running cluster; its first machine holds the controller, and both are nodes."""

    folder: Path
    machines: list[Machine]

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with what Slurm's commands need."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, argv: Sequence[str], seconds: float = HANG_SECONDS, **env: str) -> str:
        """What a command on the first machine prints.

        Raises:
            RuntimeError: it failed.
        """
        process = self.machines[0].run(argv, {**self.env, **env}, seconds)
        if process.returncode:
            raise RuntimeError(
                f"{' '.join(argv)}: {process.returncode}\n{process.stdout}{process.stderr}"
            )
        return process.stdout

    def start_node(self, machine: Machine) -> None:
        """Starts Slurm's daemon on a machine where none runs."""
        log = self.folder / f"slurmd.{machine.name}.log"
        machine.start(["slurmd", "-D", "-N", machine.name], log, self.env)

    def wait_for_job(self, job: str, seconds: float = HANG_SECONDS) -> None:
        """Returns when the job has ended, well or not; TimeoutError if it does not."""
        self._wait(lambda: not self.run(["squeue", "--noheader", "--jobs", job]), seconds)

    def wait_for_state(self, machine: Machine, state: str, seconds: float = HANG_SECONDS) -> None:
        """Returns when Slurm holds the node to be in a state; TimeoutError if it does not."""
        argv = ["sinfo", "--noheader", "--nodes", machine.name, "--format=%T"]
        # Not `run`: the controller may not answer yet.
        node = self.machines[0]
        self._wait(lambda: node.run(argv, self.env).stdout.strip() == state, seconds)

    def _wait(self, is_done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > deadline:
                logs = sorted(self.folder.glob("*.log"))
                raise TimeoutError("\n".join(f"{log}\n{log.read_text()[-3000:]}" for log in logs))
            time.sleep(0.2)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster whose nodes are idle; at the end nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="slurm_") as name, two_machines(Path(name)) as machines:
        cluster = SlurmCluster(Path(name), machines)
        _write_configuration(cluster)
        _start_munge(cluster)
        machines[0].start(["slurmctld", "-D"], Path(name, "slurmctld.log"), cluster.env)
        for machine in machines:
            cluster.start_node(machine)
        for machine in machines:
            cluster.wait_for_state(machine, "idle")
        yield cluster


def _write_configuration(cluster: SlurmCluster) -> None:
    folder, (first, second) = cluster.folder, cluster.machines
    text = CONFIGURATION.format(first=first, second=second, folder=folder)
    for name, content in (("slurm", text), ("gres", GPUS), ("cgroup", CONTROL_GROUPS)):
        (folder / f"{name}.conf").write_text(content)
    (folder / "state").mkdir()


def _start_munge(cluster: SlurmCluster) -> None:
    """The service that vouches for users; all machines reach its socket by the file system."""
    folder = cluster.folder
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    socket = folder / "munge.socket"
    argv = ["munged", "--foreground", "--force", f"--socket={socket}", *files]
    cluster.machines[0].start(argv, folder / "munged.log")
    cluster._wait(socket.exists, HANG_SECONDS)


def why_no_cluster(folder: Path) -> str:
    """Why there can be none here; empty if there can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}; apt-get install slurm-wlm munge"
    return why_no_machines(folder)


def main() -> None:
    with slurm_cluster() as cluster:
        print(cluster.run(sys.argv[1:], seconds=3600))


if __name__ == "__main__":
    main()
