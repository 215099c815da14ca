"""Permuting labels of rows that a model is scored on changes no score, to the last bit.

The answers in the histories of these rows change, too: statistics of neighbours are of histories,
and may be of training rows alone. Labels of validation rows choose the model and fit the blend of
neighbours; `evaluation/test_blend_fit.py` has that a user's own labels do not change his scores.
`continual/test_scores_first.py` has the same of partitions.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.checkpoint.warm_start.source import WarmStart
from recsys.cli import main
from recsys.data.prepare import prepare_transforms
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import score, split_interactions
from recsys.evaluation.predict import load_run
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.recsys.command_runs import tiny_config, train_argv
from tests.recsys.training.changed_answers import shuffle_labels

ARGV = ["--device", "cpu", "--batch_size", "16", "--embedding.skip", "[]"]
VOTES = ["--neighbours", "{values: history_liked, dim: 4, taste_dim: 4}"]
WITHOUT_CONTENT = ["--content", "none", "--contrastive.weight", "0"]
MODELS = {
    "votes": [*WITHOUT_CONTENT, *VOTES],
    "standardized": [*WITHOUT_CONTENT, *VOTES, "--ranking.standardize_numbers", "true"],
    "averages": [*WITHOUT_CONTENT, "--optimizer.ema_decay", "0.9"],
    "content": [*VOTES, "--embedding.tables.item.new_rows", "mean"],
}
LONG = {("votes", "anew"), ("votes", "warm"), ("averages", "anew"), ("standardized", "warm")}
LONG |= {("content", "warm")}
PAIRS = [
    pytest.param(model, start, marks=[pytest.mark.long] if (model, start) in LONG else [])
    for model in MODELS
    for start in ("anew", "warm")
]


def write_data(folder: Path, seed: int = 0) -> Path:
    """A dataset with a transform that is fitted."""
    write_dataset(folder, seed=seed)
    schema = yaml.safe_load((folder / "schema.yaml").read_text())
    schema["columns"]["scaled"] = {"kind": "dense", "column": "price", "transform": ["standardize"]}
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    prepare_transforms(str(folder))
    return folder


def changed(data: Path, out: Path, split: str, seed: int, **unchanged: list[int]) -> Path:
    """A copy with other answers in a split."""
    shutil.copytree(data, out)
    shuffle_labels(out / split, seed, **unchanged)
    prepare_transforms(str(out))
    return out


def run_on(data: Path, out: Path, *argv: str, warm_start: Path | None = None) -> Path:
    """Train a run in `out`, with one validation."""
    config = tiny_config(data.parent / "cache", *ARGV, *argv)
    start = None if warm_start is None else WarmStart(warm_start)
    with joined_ranks("cpu") as ranks:
        train(config, str(data), out, ranks, warm_start=start)
    return out


def scores_by(run: Path, split: str, data: Path, column: str = "logits") -> np.ndarray:
    """Logits of the split by a run, or another column, in the order of its rows."""
    with joined_ranks("cpu") as ranks:
        job = load_run(run, str(data), ranks, "cpu")
        scored = score(job, split_interactions(job, split), with_evidence=True)
    return scored[column].numpy()[np.argsort(scored["positions"].numpy())]


@pytest.mark.parametrize(("model", "start"), PAIRS)
def test_scores_of_valid_and_test_depend_on_no_label_there_and_on_no_other_row(
    model: str, start: str, tmp_path: Path
) -> None:
    argv = MODELS[model]
    data = write_data(tmp_path / "data")
    old_run = None
    if start == "warm":
        old_run = run_on(write_data(tmp_path / "old", seed=1), tmp_path / "before", *argv)
    first = run_on(data, tmp_path / "first", *argv, warm_start=old_run)
    unchanged = list(range(0, 20, 2))
    for split in ("valid", "test"):
        # The blend of neighbours is fitted to the labels of valid; what it blends is not.
        column = "network" if split == "valid" and VOTES[0] in argv else "logits"
        other = changed(data, tmp_path / split, split, seed=2, unchanged=unchanged)
        second = run_on(other, tmp_path / f"second_{split}", *argv, warm_start=old_run)
        expected = scores_by(first, split, data, column)
        actual = scores_by(second, split, other, column)
        assert np.array_equal(expected[unchanged], actual[unchanged])
        assert np.array_equal(scores_by(second, split, data, column), expected)


@pytest.mark.long
def test_a_trial_of_a_search_is_scored_without_the_labels_that_choose_it(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    other = changed(data, tmp_path / "other", "valid", seed=3)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"ranking.mlp_units": {"choices": [[8]]}}))
    scores = []
    for dataset in (data, other):
        out = tmp_path / f"search_{dataset.name}"
        argv = train_argv(dataset, out, *MODELS["votes"], "--embedding.skip", "[]")[1:]
        argv += ["--space", str(tmp_path / "space.yaml"), "--trials", "1"]
        assert main(["search", *argv]) == 0
        scores.append(scores_by(out / "trials" / "0000" / "run-0", "valid", data, "network"))
    assert np.array_equal(*scores)


def test_answers_of_training_rows_do_change_scores(tmp_path: Path) -> None:
    """So that the tests above can fail."""
    data = write_data(tmp_path / "data")
    other = changed(data, tmp_path / "other", "train", seed=4)
    assert pq.read_table(data / "train").num_rows == pq.read_table(other / "train").num_rows
    runs = [run_on(path, tmp_path / f"run_{path.name}", *MODELS["votes"]) for path in (data, other)]
    first, second = (scores_by(run, "test", data) for run in runs)
    assert not np.array_equal(first, second)
