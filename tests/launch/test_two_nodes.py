"""A job of two nodes that loses one: machines with their own addresses, one rank each.

Each node runs the very words that the torchx component gives to the nodes of a scheduler. A lost
node is silent: its link goes down before its processes die, so nothing tells the other of it.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torchx.specs import macros
from torchx.specs.builders import materialize_appdef
from torchx.specs.finder import get_component

from tests.datasets import write_dataset
from tests.launch.machines import Machine, two_machines, why_no_machines
from tests.ranks import HANG_SECONDS

ROOT = Path(__file__).parents[2]
RECIPE = ["--config", str(ROOT / "recsys/recipes/tiny.yaml"), "--device", "cpu"]
SETTINGS = ["--batch_size", "8", "--epochs", "2", "--patience", "9", "--stall_timeout", "10"]


@dataclass
class Job:
    """`recsys train` on both machines, its output in `NAME-of-machine.log` beside the run."""

    run: Path
    machines: list[Machine]

    def start_on(self, machine: Machine) -> subprocess.Popen[bytes]:
        """Starts its torchrun on one of the machines, as a scheduler would."""
        folder = self.run.parent
        argv = ["--data", f"{folder}/data", "--out", str(self.run), "--cache", f"{folder}/cache"]
        argv += [*RECIPE, *SETTINGS, "--checkpoint.every_steps", "3"]
        component = get_component(f"{ROOT}/launch/components.py:train").fn
        nodes = ["--nnodes", "2", "--nproc", "1", "--max_retries", "3"]
        (role,) = materialize_appdef(component, [*nodes, "--", *argv]).roles
        role = macros.Values("", "job", replica_id="0", rank0_env="FIRST_NODE").apply(role)
        env = {**os.environ, **role.env, "FIRST_NODE": "node0", "OMP_NUM_THREADS": "1"}
        # Ranks that hang because a node is gone do not end by a signal that asks them to.
        env["PET_SHUTDOWN_TIMEOUT"] = "2"
        return machine.start([role.entrypoint, *role.args], self.log(machine), env)

    def start(self) -> list[subprocess.Popen[bytes]]:
        return [self.start_on(machine) for machine in self.machines]

    def log(self, machine: Machine) -> Path:
        return self.run.with_name(f"{self.run.name}-{machine.name}.log")

    def wait_for_checkpoint(self, step: int) -> None:
        """Returns when there is one of at least so many steps."""
        deadline = time.monotonic() + HANG_SECONDS
        while not [c for c in self.run.glob("checkpoints/step-*") if int(c.name[5:]) >= step]:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def end(self, *processes: subprocess.Popen[bytes]) -> list[int]:
        """The exit codes of torchrun."""
        try:
            return [process.wait(timeout=HANG_SECONDS) for process in processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.output()) from error

    def output(self) -> str:
        return "".join(self.log(machine).read_text() for machine in self.machines)

    def metrics(self) -> dict[str, Any]:
        """What the run has measured, but for its speed."""
        metrics = json.loads((self.run / "metrics.json").read_text())
        return {**metrics, "train": metrics["train"]["steps"]}


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    folder = tmp_path_factory.mktemp("machines")
    if reason := why_no_machines(folder):
        pytest.skip(reason)
    with two_machines(folder) as machines:
        yield machines


@pytest.fixture(scope="module")
def undisturbed(machines: list[Machine], tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("two_nodes")
    write_dataset(folder / "data", {"train": 403, "valid": 41, "test": 37})
    job = Job(folder / "undisturbed", machines)
    assert job.end(*job.start()) == [0, 0], job.output()
    return job


def test_a_job_that_loses_each_node_in_turn_ends_as_if_nothing_had_happened(
    undisturbed: Job, machines: list[Machine]
) -> None:
    first, second = machines
    job = Job(undisturbed.run.with_name("disturbed"), machines)

    # The first node holds the store where nodes meet: without it the others end, with the cause.
    _, remaining = job.start()
    job.wait_for_checkpoint(3)
    first.lose()
    first.come_back()
    assert job.end(remaining) != [0]
    assert "C10d store" in job.output()

    # The same command goes on. Without another node, the first waits until one comes.
    stays, _ = job.start()
    job.wait_for_checkpoint(9)
    second.lose()
    time.sleep(1)
    assert stays.poll() is None
    second.come_back()
    assert job.end(stays, job.start_on(second)) == [0, 0], job.output()
    assert job.output().count("going on after step") == 2
    assert job.metrics() == undisturbed.metrics()
