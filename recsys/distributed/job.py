"""Names of this process's job, which torchrun and Slurm keep when they restart its ranks."""

import os
import socket
from dataclasses import dataclass
from typing import Self

import psutil

# Variables of these prefixes make a process a rank of torchrun's job.
RANK_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True)
class JobName:
    """Names that the launchers of this process give to its job; empty without a launcher."""

    torchrun: str = ""
    slurm: str = ""

    @classmethod
    def from_environment(cls) -> Self:
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
        if run_id == "none":  # attempts share nothing but the agent, which starts them
            agent = psutil.Process().parent()
            run_id = f"{socket.gethostname()}:{agent.pid}:{agent.create_time()}" if agent else ""
        return cls(run_id, os.environ.get("SLURM_JOB_ID", ""))

    def __str__(self) -> str:
        return self.torchrun or self.slurm


def restarts(launcher: str) -> int:
    """Return how often `TORCHELASTIC` or `SLURM` says it has restarted this job."""
    return int(os.environ.get(f"{launcher}_RESTART_COUNT") or 0)


def environment_without_rank() -> dict[str, str]:
    """Return this process's environment for a process that is no rank of its job."""
    return {name: value for name, value in os.environ.items() if not name.startswith(RANK_PREFIXES)}
