"""A run leaves what evaluation needs, and accumulated gradients are those of larger batches."""

import gc
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import recsys.training.train
import recsys.training.trainer
from recsys.build import Job
from recsys.checkpoint.files import folders_by_age
from recsys.config import load_config
from recsys.distributed.lockstep import TrainingStopped
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import evaluate
from recsys.training.train import train
from recsys.training.trainer import Trainer
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.checkpoint.stopped_runs import StepsSeen, assert_same_end, run_training
from tests.recsys.command_runs import (
    NUM_ROWS,
    TINY,
    TrainedRun,
    assert_same_metrics,
    run_recsys,
)
from tests.recsys.em3_runs import ranks_of

METRICS = {"auc", "gauc", "logloss", "ne", "num_samples"}


@pytest.fixture(scope="module")
def metrics(trained: TrainedRun) -> dict[str, Any]:
    return json.loads((trained.run / "metrics.json").read_text())


def test_the_run_holds_what_the_contract_names(trained: TrainedRun) -> None:
    assert load_config(trained.run / "config.yaml").epochs == 2
    plan = (trained.run / "plan.txt").read_text()
    assert "item" in plan and "1: 15 x 16" in plan and "rowwise_adagrad (fused)" in plan
    assert (trained.run / "checkpoints" / "best" / ".metadata").is_file()
    checkpoints = sorted(path.name for path in (trained.run / "checkpoints").iterdir())
    assert checkpoints == ["best", "step-00000004", "step-00000008"]
    assert list((trained.run / "tensorboard").glob("events.out.tfevents.*"))


def test_metrics_json_has_exactly_the_keys_of_the_contract(metrics: dict[str, Any]) -> None:
    assert set(metrics) == {"valid", "test", "train", "world_size", "versions"}
    for split in ("valid", "test"):
        assert set(metrics[split]) >= METRICS | {"cold", "warm"}
        assert metrics[split]["num_samples"] == NUM_ROWS[split]
        for subset in ("cold", "warm"):
            assert set(metrics[split][subset]) >= METRICS
    assert set(metrics["train"]) == {"samples_per_second", "seconds", "steps", "peak_bytes"}
    assert metrics["train"]["steps"] == 2 * math.ceil(math.ceil(NUM_ROWS["train"] / 2) / 8)
    assert metrics["world_size"] == 2
    assert {"torch", "torchrec"} <= set(metrics["versions"])


def test_tensorboard_holds_losses_gradient_norm_and_the_state_of_the_bank(
    trained: TrainedRun,
) -> None:
    events = EventAccumulator(str(trained.run / "tensorboard"))
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    for name in ("loss", "ranking", "contrastive", "gradient_norm", "bank_coverage", "bank_age"):
        assert [event.step for event in scalars[f"train/{name}"]] == list(range(1, 9)), name
    assert all(event.value > 0 for event in scalars["train/gradient_norm"])
    assert all(event.value == 1 for event in scalars["train/bank_coverage"])  # filled at the start
    ages = [event.value for event in scalars["train/bank_age"]]
    assert 0 < ages[0] < ages[-1] < 8
    assert {"valid/auc", "valid/gauc"} <= set(scalars)


@pytest.fixture(scope="module")
def predicted(trained: TrainedRun) -> tuple[list[pa.Table], pa.Table]:
    """The test and training files without their label and with a column of the user's own, and
    what `recsys predict` made of them."""
    folder = trained.run.parent
    inputs = []
    for index, name in enumerate(["test/part-0", "train/part-1", "train/part-0"]):
        table = pq.read_table(trained.data / f"{name}.parquet").drop_columns(["liked"])
        note = pa.array([f"{index}/{row}" for row in range(table.num_rows)])
        table = table.append_column("note", note)
        pq.write_table(table, folder / f"input-{index}.parquet", row_group_size=5)
        inputs.append(table)
    files = [str(folder / f"input-{index}.parquet") for index in range(3)]
    out = folder / "new" / "predictions.parquet"
    argv = ["--run", str(trained.run), "--input", *files, "--out", str(out), "--device", "cpu"]
    process = run_recsys("predict", *argv, ranks=2)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return inputs, pq.read_table(out)


def test_predict_keeps_all_rows_and_columns_in_order(predicted: Any) -> None:
    inputs, output = predicted
    assert output.column_names == [*inputs[0].column_names, "prediction_liked"]
    assert output.drop_columns(["prediction_liked"]).equals(pa.concat_tables(inputs))
    probabilities = output["prediction_liked"].to_numpy()
    assert ((probabilities > 0) & (probabilities < 1)).all() and len(set(probabilities)) > 50


def test_metrics_json_equals_brute_force_over_the_predictions(
    predicted: Any, trained: TrainedRun, metrics: dict[str, Any]
) -> None:
    _, output = predicted
    rows = NUM_ROWS["test"]
    probability = output["prediction_liked"].to_numpy()[:rows]
    impressions = pq.read_table(trained.data / "test" / "part-0.parquet")
    labels, users, items = (impressions[name].to_numpy() for name in ("liked", "user", "item"))
    report = metrics["test"]
    assert report["auc"] == pytest.approx(roc_auc_score(labels, probability))
    loss = log_loss(labels, probability.astype(np.float64))
    assert report["logloss"] == pytest.approx(loss, abs=1e-6)
    share = labels.mean()
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert report["ne"] == pytest.approx(loss / entropy, abs=1e-6)
    weighted = [
        (roc_auc_score(labels[users == user], probability[users == user]), (users == user).sum())
        for user in np.unique(users)
        if len(set(labels[users == user])) == 2
    ]
    gauc = np.average([auc for auc, _ in weighted], weights=[count for _, count in weighted])
    assert report["gauc"] == pytest.approx(gauc)
    trained_items = pq.read_table(trained.data / "train")["item"].to_numpy()
    cold = np.array([(trained_items == item).sum() < 5 for item in items])
    assert report["cold"]["num_samples"] == cold.sum()
    assert report["cold"]["auc"] == pytest.approx(roc_auc_score(labels[cold], probability[cold]))


def evaluated(rank: int, world_size: int, run: Path) -> dict[str, Any]:
    return evaluate(run, None, "test", ranks_of(rank, world_size), "cpu")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_of_two_ranks_evaluates_alike_on_one_and_on_three(
    trained: TrainedRun, metrics: dict[str, Any], world_size: int
) -> None:
    for report in run_on_ranks(evaluated, world_size, trained.run):
        assert_same_metrics(report, metrics["test"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_dataset(folder / "data", {"train": 33, "valid": 20, "test": 20})
    return folder


@pytest.mark.parametrize(
    ("metric", "share", "epochs", "best"),
    [
        ("auc", 0, 4, 1),
        ("gauc", 0, 3, 0),
        ("auc_and_gauc", 0, 5, 2),
        ("all_and_unseen", 0, 6, 3),
        ("auc", 1.5, 5, 1),
    ],
)
def test_training_ends_without_gain_and_the_best_model_is_kept_and_tested(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    share: float,
    epochs: int,
    best: int,
) -> None:
    """AUC .6 .7 .65 .7 with patience 2: four epochs, and the model of the second; so by others.

    With a share of 1.5 another 9 steps must pass after the best model's 6: five epochs.
    """
    argv = ["--epochs", "9", "--patience", "2", "--batch_size", "16", "--device", "cpu"]
    argv += ["--best_model_by", metric, "--content", "none", "--patience_share", str(share)]
    config = load_config(TINY, argv)
    aucs = [0.6, 0.7, 0.65, 0.7, 0.6, 0.9]
    gaucs = [0.6, 0.5, 0.58, 0.5, 0.6, 0.9]
    unseen = [0.3, 0.4, 0.4, 0.9, 0.4, 0.1]  # the AUC of unseen items, whose GAUC is undefined
    validations = iter(zip(aucs, gaucs, unseen))
    weights: list[torch.Tensor] = []
    evaluate_split = recsys.training.train.evaluate_split

    def scripted(
        job: Job, split: str, counts: np.ndarray, lockstep: Any, searches: bool, **options: Any
    ) -> dict[str, Any]:
        weights.append(job.em3.ranking.mlp[-1].weight.detach().clone())  # type: ignore[union-attr, index]
        report = evaluate_split(job, split, counts, lockstep, searches, **options)
        if split == "valid":
            report["auc"], report["gauc"], auc_unseen = next(validations)
            report["unseen"] |= {"auc": auc_unseen, "gauc": None}
        return report

    for module in (recsys.training.trainer, recsys.training.train):
        monkeypatch.setattr(module, "evaluate_split", scripted)
    with joined_ranks("cpu") as ranks:
        metrics = train(config, str(small / "data"), tmp_path / "run", ranks)
    *validated, tested = weights
    assert len(validated) == epochs and metrics["train"]["steps"] == epochs * 3
    assert metrics["valid"]["auc"] == aucs[best]
    assert [torch.equal(tested, weight) for weight in validated].index(True) == best
    assert not torch.equal(tested, validated[-1])


def test_the_trainer_is_freed_with_its_run_and_not_by_garbage_collection(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    config = load_config(TINY, ["--batch_size", "8", "--device", "cpu", "--content", "none"])
    gc.collect()
    gc.disable()
    try:
        with joined_ranks("cpu") as ranks:
            train(config, str(data), tmp_path / "run", ranks)
        assert not [instance for instance in gc.get_objects() if isinstance(instance, Trainer)]
    finally:
        gc.enable()


# Two epochs of 8 batches, each with a validation in its middle: groups of 3 and 1, twice.
GROUP = ["--accumulate_steps", "3", "--validations_per_epoch", "2", "--log_every_steps", "1"]
ENDS_OF_GROUPS = [3, 4, 7, 8, 11, 12, 15, 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accumulating_runs")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def full_run(folder: Path) -> Path:
    """An undisturbed run."""
    run_training(folder, folder / "whole", *GROUP)
    return folder / "whole"


def progress_of(checkpoint: Path) -> Any:
    return json.loads((checkpoint / "checkpoint.json").read_text())["progress"]


def test_checkpoints_fall_where_a_dense_step_has_just_been_made(full_run: Path) -> None:
    steps = {progress_of(path)["steps"] for path in folders_by_age(full_run / "checkpoints")}
    assert len(steps) > 3 and steps <= set(ENDS_OF_GROUPS)


def test_the_norm_of_gradients_is_told_only_of_whole_groups(full_run: Path) -> None:
    events = EventAccumulator(str(full_run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/gradient_norm")] == ENDS_OF_GROUPS
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 17))


def test_sigterm_within_a_group_is_obeyed_at_its_end_and_the_run_goes_on_to_the_same_bits(
    folder: Path, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        first = StepsSeen(patch, 5)
        with pytest.raises(TrainingStopped):
            run_training(folder, tmp_path / "run", *GROUP)
    assert first.steps[-1][0] in ENDS_OF_GROUPS and len(first.steps) < 16
    with monkeypatch.context() as patch:
        second = StepsSeen(patch)
        run_training(folder, tmp_path / "run", *GROUP)
    assert [number for number, _ in first.steps + second.steps] == list(range(1, 17))
    assert_same_end(tmp_path / "run", full_run)
