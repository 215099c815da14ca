"""Whole runs with what makes content cheap: shared items, few encoded, searched histories."""

from pathlib import Path
from typing import Any

import pytest

from recsys.config import load_config
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import evaluate, load_run
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import NUM_ROWS, TINY, assert_same_metrics
from tests.recsys.content.cache.scored_slowly import assert_scored_alike
from tests.recsys.em3_runs import ranks_of

RECIPES = {
    "shared and searched": [
        "--content.dedup=global",
        "--content.history.top_k=2",
        "--content.history.simtier_bins=4",
    ],
    "shared, a share encoded": ["--content.dedup=global", "--content.encoder_share=0.3"],
    "shared, history encoded": ["--content.dedup=global", "--content.history.mode=full"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cheap") / "data", NUM_ROWS)


def config_of(data: Path, recipe: str, *options: str) -> Any:
    argv = ["--batch_size=8", "--epochs=1", "--device=cpu", f"--cache={data.parent / 'cache'}"]
    return load_config(TINY, [*argv, *RECIPES[recipe], *options])


def trained(rank: int, world_size: int, data: Path) -> dict[str, Any]:
    """Test metrics of each recipe; scores are those of the slow way."""
    ranks, metrics = ranks_of(rank, world_size), {}
    for recipe in RECIPES:
        run = data.parent / recipe
        metrics[recipe] = train(config_of(data, recipe), str(data), run, ranks)["test"]
        assert_scored_alike(load_run(run, None, ranks, "cpu"), "test")
    return metrics


@pytest.mark.long
def test_two_ranks_train_each_and_one_rank_evaluates_to_the_same(data: Path) -> None:
    first, second = run_on_ranks(trained, 2, data)
    assert first.keys() == second.keys() == RECIPES.keys()
    for recipe, metrics in first.items():
        assert_same_metrics(second[recipe], metrics)
        assert metrics["num_samples"] == NUM_ROWS["test"]
        with joined_ranks("cpu") as ranks:
            report = evaluate(data.parent / recipe, None, "test", ranks, "cpu")
        assert_same_metrics(report, metrics)
