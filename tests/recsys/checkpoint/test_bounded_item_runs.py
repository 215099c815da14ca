"""Runs whose items get their rows while training: stopped, resumed, resharded, started from."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.build import build_job
from recsys.checkpoint.warm_start.plan import plan_warm_start
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import Config, OptimizerSettings
from recsys.data.item_frequency import ItemCounts
from recsys.distributed.lockstep import TrainingStopped
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import check_data
from recsys.evaluation.predict import load_run
from recsys.training.initial_state import open_warm_start, start_warm
from recsys.training.train import train
from tests.recsys.checkpoint.kill_ranks import tensors
from tests.recsys.checkpoint.stopped_runs import StepsSeen
from tests.recsys.checkpoint.warm_start.warm_runs import state_of
from tests.recsys.content.churning_items import content, raw, write_churn
from tests.recsys.content.test_bounded_items import ids_of
from tests.recsys.em3_runs import em3_config

pytestmark = pytest.mark.long


def config_of(cache: Path) -> Config:
    """The tiny model with one validation after each of two epochs of ten steps."""
    return em3_config(
        cache,
        table_optimizer="rowwise_adagrad",
        content=content(),
        batch_size=4,
        epochs=2,
        patience=9,
        optimizer=OptimizerSettings(warmup_steps=1),
    )


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a `run` of two epochs."""
    folder = tmp_path_factory.mktemp("bounded")
    write_churn(folder / "data")
    with joined_ranks("cpu") as ranks:
        train(config_of(folder), str(folder / "data"), folder / "run", ranks)
    return folder


@pytest.mark.parametrize("stop_after", [4, 13])
def test_a_stopped_run_ends_with_the_same_bits(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    with joined_ranks("cpu") as ranks, monkeypatch.context() as patch:
        StepsSeen(patch, stop_after=stop_after)
        with pytest.raises(TrainingStopped):
            train(config_of(full_run), str(full_run / "data"), tmp_path / "run", ranks)
    with joined_ranks("cpu") as ranks:
        train(config_of(full_run), str(full_run / "data"), tmp_path / "run", ranks)
    for name in ("step-00000020", "best"):
        one, two = (tensors(run / "run" / "checkpoints" / name) for run in (tmp_path, full_run))
        assert one.keys() == two.keys() >= {"bank", "vocabulary.item.ids"}
        for key, value in one.items():
            assert torch.equal(value, two[key]), key
    metrics = [json.loads((r / "run" / "metrics.json").read_text()) for r in (tmp_path, full_run)]
    assert metrics[0]["test"] == metrics[1]["test"]
    vocabularies = [result["train"]["vocabularies"]["item"] for result in metrics]
    assert vocabularies[0] == vocabularies[1] and vocabularies[0]["evicted"] > 3


def test_items_are_counted_by_raw_id_so_that_cold_and_unseen_ones_are_known(full_run: Path) -> None:
    counts = ItemCounts.load(full_run / "run" / "item_counts.npy")
    assert set(counts.items.tolist()) == {int(raw(item)) for item in (*range(17),)}
    assert counts.of(np.array([int(raw(0)), 0])).tolist() == [4, 0]
    metrics = json.loads((full_run / "run" / "metrics.json").read_text())["test"]
    assert metrics["cold"]["num_samples"] == int(counts.counts[counts.counts < 5].sum())
    assert metrics["unseen"]["num_samples"] == 0


def test_a_run_begins_from_another_one_with_a_larger_table(full_run: Path, tmp_path: Path) -> None:
    """Rows, moments and bank vectors follow their ids to the places of the new size."""
    data = tmp_path / "data"
    write_churn(data)
    schema = (data / "schema.yaml").read_text()
    (data / "schema.yaml").write_text(schema.replace("num_embeddings: 17", "num_embeddings: 300"))
    with joined_ranks("cpu") as ranks:
        old = load_run(full_run / "run", None, ranks, "cpu")
        old_state, rows = state_of(old), ids_of(old.vocabularies.by_table["item"])
        request = WarmStart(full_run / "run")
        source, columns = open_warm_start(request, str(data), tmp_path / "new", ranks)
        job = build_job(replace(config_of(full_run)), str(data), ranks, columns)
        (tmp_path / "new").mkdir()
        plan = plan_warm_start(job, source)
        start_warm(job, tmp_path / "new", plan, check_data(job).numbers)
        state, new_rows = state_of(job), ids_of(job.vocabularies.by_table["item"])
    assert new_rows.keys() == rows.keys()
    for item, row in rows.items():
        assert torch.equal(state["item"][new_rows[item]], old_state["item"][row])
        assert torch.equal(state["bank"][new_rows[item]], old_state["bank"][row])
    free_rows = np.setdiff1d(np.arange(300), list(new_rows.values()))
    assert not state["bank"][free_rows].any()
