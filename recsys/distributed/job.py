"""Which job this process belongs to, as its launcher names it over restarts.

torchrun and Slurm restart the ranks of a job in new processes; whether a folder was begun by this
job or by an earlier one cannot be seen from the processes, only from these names.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class JobName:
    """Names of a job by the launchers above this process; empty where there is none."""

    torchrun: str = ""
    slurm: str = ""

    @staticmethod
    def of_environment() -> JobName:
        """Return the names of the job that this process belongs to."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
        if run_id == "none":  # the agent, which starts every attempt, is all that they share
            agent = psutil.Process().parent()
            run_id = f"{socket.gethostname()}:{agent.pid}:{agent.create_time()}" if agent else ""
        return JobName(run_id, os.environ.get("SLURM_JOB_ID", ""))

    def __str__(self) -> str:
        """Return the name for messages."""
        return self.torchrun or self.slurm


def restarts(launcher: str) -> int:
    """Return how often `TORCHELASTIC` or `SLURM` has restarted this job, as far as it counts."""
    return int(os.environ.get(f"{launcher}_RESTART_COUNT") or 0)
