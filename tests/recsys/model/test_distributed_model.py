"""EM3 on two ranks equals EM3 on one rank equals EM3 without any sharding, over three steps.

The loss of a rank is the mean over its own rows, so losses are averaged, logits joined, and the
gradients of dense parameters already averaged by DistributedDataParallel.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.datasets import write_dataset
from tests.ranks import RunsByWorldSize, run_on_ranks
from tests.recsys.em3_runs import (
    STEPS,
    TABLE_RATES,
    TABLES,
    Run,
    full_table,
    train_sharded,
    train_unsharded,
)

CASES = [
    (sharding, optimizer)
    for sharding in ("row_wise", "table_wise", "column_wise")
    for optimizer in ("sgd", "rowwise_adagrad")
]
PLAIN_CASES = [("sgd", 1), ("rowwise_adagrad", 1), ("rowwise_adagrad", 2)]
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}  # a GPU adds up in another order than the reference
# AdamW divides a gradient by its size: where the gradient is nothing but rounding (a bias that
# softmax cancels), so is the direction of the step.
SMALLEST_GRADIENT = 1e-6

by_case = pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
by_world_size = pytest.mark.parametrize("world_size", [1, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, device: str) -> dict[Any, Run]:
    """By (table optimizer, column shards)."""
    return run_on_ranks(train_unsharded, 1, folder, PLAIN_CASES, device=device)[0]


@pytest.fixture(scope="module")
def runs(folder: Path, device: str) -> RunsByWorldSize:
    """By number of ranks: every rank's runs of every case."""
    return RunsByWorldSize(train_sharded, folder, CASES, device=device)


def plain_run(plain: dict[Any, Run], case: Any, world_size: int) -> Run:
    """Under column-wise sharding each column shard keeps its own row-wise moment."""
    sharding, optimizer = case
    cut = sharding == "column_wise" and optimizer == "rowwise_adagrad"
    return plain[optimizer, world_size if cut else 1]


def assert_close(runs: RunsByWorldSize, actual: Tensor, expected: Tensor, name: str = "") -> None:
    tolerance = TOLERANCE[runs.device]
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


@by_world_size
@by_case
def test_losses_and_logits_equal_those_without_sharding(
    runs: Any, plain: Any, case: Any, world_size: int
) -> None:
    ranks: list[Run] = [run[case] for run in runs[world_size]]
    expected = plain_run(plain, case, world_size)
    for step in range(STEPS):
        loss = torch.stack([run.losses[step] for run in ranks]).mean()
        assert_close(runs, loss, expected.losses[step])
        logits = torch.cat([run.logits[step] for run in ranks])
        assert_close(runs, logits, expected.logits[step])


@by_world_size
@by_case
def test_gradients_of_all_dense_parameters_equal_those_without_sharding(
    runs: Any, plain: Any, case: Any, world_size: int
) -> None:
    expected = plain_run(plain, case, world_size)
    for run in (run[case] for run in runs[world_size]):
        for step in range(STEPS):
            assert run.gradients[step].keys() == expected.gradients[step].keys()
            for name, gradient in run.gradients[step].items():
                assert_close(runs, gradient, expected.gradients[step][name], name)


@by_world_size
@by_case
def test_updated_weights_equal_those_without_sharding(
    runs: Any, plain: Any, case: Any, world_size: int
) -> None:
    ranks: list[Run] = [run[case] for run in runs[world_size]]
    expected = plain_run(plain, case, world_size)
    for name in TABLES:
        for step in range(STEPS + 1):
            table = full_table([expected], step, name)
            assert_close(runs, full_table(ranks, step, name), table, f"{name}, step {step}")
        assert not torch.allclose(table, full_table([expected], 0, name), atol=1e-3)
    for run in ranks:
        assert run.dense.keys() == expected.dense.keys()
        for name, weight in run.dense.items():
            if name.endswith("attention.key.bias"):
                continue  # shifts all scores of a softmax alike: its gradient is rounding alone
            sizes = torch.stack([step[name].abs() for step in expected.gradients])
            defined = ((sizes == 0) | (sizes > SMALLEST_GRADIENT)).all(dim=0)
            assert_close(runs, weight[defined], expected.dense[name][defined], name)


@by_world_size
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_gradients_of_tables_equal_those_without_sharding(
    runs: Any, plain: Any, sharding: str, world_size: int
) -> None:
    """What plain SGD moved a table by, over its learning rate, is the gradient."""
    case = (sharding, "sgd")
    ranks: list[Run] = [run[case] for run in runs[world_size]]
    for name in TABLES:
        for step in range(STEPS):
            moved, expected = (
                (full_table(run, step, name) - full_table(run, step + 1, name)) / TABLE_RATES["sgd"]
                for run in (ranks, [plain_run(plain, case, world_size)])
            )
            assert expected.abs().max() > 1e-3
            assert_close(runs, moved, expected, f"{name}, step {step}")


@by_case
def test_dense_weights_and_lora_replicas_are_bit_equal_on_all_ranks(runs: Any, case: Any) -> None:
    first, second = (run[case].dense for run in runs[2])
    assert [name for name in first if "encoders" in name and "lora_A" in name]
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
