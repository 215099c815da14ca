"""Kills ranks of one training run again and again, and compares its end with an undisturbed run.

`python -m tests.recsys.checkpoint.kill_ranks --kills 20` trains three times on two ranks by torchx:
in peace, with two ranks asked to end (SIGTERM), and with so many killed at random steps. torchx
restarts the job each time. Weights, optimizer state, bank and metrics must be equal to the last
bit, and every impression trained on once per epoch; SIGTERM must not lose a step.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.datasets import write_dataset
from tests.recsys.command_runs import ROOT, run_program, train_argv

NUM_ROWS = {"train": 403, "valid": 41, "test": 37}
EPOCHS, STEPS_PER_EPOCH = 3, 26
Plan = list[tuple[int, int, int, float]]  # step, rank, signal, seconds after the step


def random_plan(kills: int, seed: int) -> Plan:
    """SIGKILL for a random rank at so many different random steps."""
    rng = random.Random(seed)
    steps = rng.sample(range(1, EPOCHS * STEPS_PER_EPOCH), kills)
    return [(step, rng.randrange(2), signal.SIGKILL, rng.random() * 0.1) for step in sorted(steps)]


def train(folder: Path, name: str, plan: Plan) -> Path:
    """Trains under `folder/name` by torchx, with what is planned; returns that folder."""
    job_folder = folder / name
    job_folder.mkdir()
    (job_folder / "plan.json").write_text(json.dumps(plan))
    argv = train_argv(folder / "data", job_folder / "run", "--epochs", str(EPOCHS))[1:]
    argv += ["--patience", "9", "--checkpoint.every_steps", "3"]
    hook = f"TRACE={job_folder},PYTHONPATH={Path(__file__).parent / 'fault_hook'}:{ROOT}"
    job = ["-s", "local_cwd", "launch/components.py:train", "--nproc", "2", "--env", hook]
    retries = ["--max_retries", str(len(plan) + 1)]
    process = run_program("torchx", "run", *job, *retries, "--", *argv, seconds=900)
    (job_folder / "log.txt").write_text(process.stdout + process.stderr)
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}:\n{process.stderr[-8000:]}")
    return job_folder


def steps_made(job_folder: Path) -> dict[int, list[list[Any]]]:
    """By rank all steps in the order they were made, those made again too."""
    return {
        rank: [json.loads(line) for line in (job_folder / f"steps-{rank}.jsonl").open()]
        for rank in range(2)
    }


def check_impressions(job_folder: Path) -> tuple[int, int]:
    """Each epoch's impressions are the data, once, in the steps that led to the result.

    Returns:
        steps in the result, and steps made in all.
    """
    counts = [Counter[int]() for _ in range(EPOCHS)]
    steps_by_rank = steps_made(job_folder)
    remaining: dict[int, list[Any]] = {}
    for rank, steps in steps_by_rank.items():
        remaining = {}
        for number, loss, positions in steps:
            again = remaining.setdefault(number, [loss, positions])
            assert again == [loss, positions], f"rank {rank} step {number} differs when made again"
        assert sorted(remaining) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
        for number, (_, positions) in remaining.items():
            epoch = (number - 1) // STEPS_PER_EPOCH
            counts[epoch].update(position for position in positions if position >= 0)
    assert all(count == Counter(range(NUM_ROWS["train"])) for count in counts)
    return len(remaining), len(steps_by_rank[0])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    state: dict[str, Any] = {}
    reader = dcp.FileSystemReader(folder)
    _load_state_dict(state, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def check_equal(job_folder: Path, other: Path) -> int:
    """Same bits in the last and the best checkpoint, same metrics; returns the tensors compared."""
    compared = 0
    runs = job_folder / "run", other / "run"
    for name in (f"step-{EPOCHS * STEPS_PER_EPOCH:08d}", "best"):
        one, two = (tensors(run / "checkpoints" / name) for run in runs)
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.equal(value, two[key]), f"{name}: {key} differs"
        compared += len(one)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    for values in metrics:
        assert values.pop("train")["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert metrics[0] == metrics[1]
    return compared


def survive(folder: Path, peaceful: Path, name: str, plan: Plan) -> str:
    """Trains as planned, compares with the undisturbed run, and says what was seen."""
    disturbed = train(folder, name, plan)
    carried_out = len(list(disturbed.glob("done-*")))
    assert carried_out == len(plan), f"{carried_out} of {len(plan)} signals were sent"
    steps, num_made = check_impressions(disturbed)
    if all(number == signal.SIGTERM for _, _, number, _ in plan):
        assert num_made == steps, f"SIGTERM lost {num_made - steps} steps"
    compared = check_equal(peaceful, disturbed)
    return (
        f"{name}: {carried_out} signals; {steps} steps in the result, {num_made} made by rank 0; "
        f"{compared} tensors and all metrics equal to the last bit; every impression once per epoch"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", NUM_ROWS)
        peaceful = train(folder, "peaceful", [])
        check_impressions(peaceful)
        terminated = [(11, 0, signal.SIGTERM, 0.0), (40, 1, signal.SIGTERM, 0.0)]
        print(survive(folder, peaceful, "terminated", terminated), flush=True)
        killed = random_plan(arguments.kills, arguments.seed)
        print(survive(folder, peaceful, "killed", killed), flush=True)


if __name__ == "__main__":
    sys.exit(main())
