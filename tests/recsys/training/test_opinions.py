"""Opinions on items are counted from the histories of training rows, by groups of users."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml

from recsys.config import load_config
from recsys.data.schema import Column, Schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.ranking.layers.collaborative_filtering import CollaborativeFiltering, automatic_groups
from recsys.training.initial_state import OpinionSums
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY
from tests.recsys.training.continual.walk_runs import NAMES, WITHOUT_CONTENT, walk, write_walk

WORDS = ["--device", "cpu", "--batch_size", "16", *WITHOUT_CONTENT]
VOTES = ["--ranking.opinions", "history_liked"]


def run_on(data: Path, out: Path, *words: str) -> Path:
    with joined_ranks("cpu") as ranks:
        train(load_config(TINY, [*WORDS, *VOTES, *words]), str(data), out, ranks)
    return out


def groups_of(run: Path) -> int:
    """Groups of the votes of a loaded run, which its settings have, too."""
    with joined_ranks("cpu") as ranks:
        job = load_run(run, None, ranks, "cpu")
        (votes,) = (
            module
            for module in job.em3.ranking.modules()
            if isinstance(module, CollaborativeFiltering)
        )
    settings = yaml.safe_load((run / "config.yaml").read_text())["ranking"]
    assert settings["opinion_groups"] == votes.opinions.shape[1] and votes.opinions.any()
    return votes.opinions.shape[1]


def test_each_user_has_a_group_unless_there_are_too_many() -> None:
    assert automatic_groups(num_users=6041, num_items=3707) == 6041
    assert automatic_groups(num_users=10**7, num_items=100) == 8192
    assert automatic_groups(num_users=10**7, num_items=10**6) * 2 * 10**6 <= 2**30
    assert automatic_groups(num_users=10**7, num_items=10**9) == 1


def test_a_run_has_a_group_for_each_user_by_default(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", num_users=23)
    assert groups_of(run_on(data, tmp_path / "run")) == 23


def test_a_run_of_before_goes_on_with_its_own_number(tmp_path: Path) -> None:
    """Earlier versions wrote 512 into every run."""
    data = write_dataset(tmp_path / "data", num_users=23)
    run = run_on(data, tmp_path / "run", "--ranking.opinion_groups", "7")
    assert groups_of(run_on(data, run, "--epochs", "2")) == 7
    with pytest.raises(ValueError, match=r"opinion_groups \(checkpoint: 7, now: 9\)"):
        run_on(data, run, "--epochs", "3", "--ranking.opinion_groups", "9")


def test_a_run_without_votes_goes_on_though_earlier_versions_wrote_a_number(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    words = ["--ranking.opinions", "null"]
    run = run_on(data, tmp_path / "run", *words, "--ranking.opinion_groups", "512")
    run_on(data, run, *words, "--epochs", "2")


def test_a_walk_keeps_its_groups_when_the_table_of_users_grows(tmp_path: Path) -> None:
    write_walk(tmp_path / "data", 2)
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, *VOTES, last="2025-11-08")
    schema = yaml.safe_load((tmp_path / "data" / "schema.yaml").read_text())
    schema["columns"]["user"]["num_embeddings"] = 40
    (tmp_path / "data" / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, *VOTES)
    assert groups_of(tmp_path / "run" / "partitions" / NAMES[1]) == 12


SCHEMA = Schema(
    "item",
    "user",
    {
        "user": Column("id", num_embeddings=9),
        "item": Column("id", num_embeddings=3),
        "history": Column("sequence", shares="item", parallel=["stars"]),
        "liked": Column("label"),
    },
)


def test_an_opinion_is_the_mean_of_a_group_of_users_relative_to_their_own_means() -> None:
    """Users 1 and 3 are group 1; an item without a row in a group has the opinion 0."""
    rows = pa.table(
        {
            "user": [1, 3, 2, 2],
            "history": pa.array([[0], [0, 2], [1], []], pa.list_(pa.int64())),
            "stars": pa.array([[1.0], [0.0, 0.7], [0.4], []], pa.list_(pa.float32())),
        }
    )
    sums = OpinionSums(SCHEMA, "stars", num_groups=2, mean=0.4)
    sums.add(rows)
    # With 5 prior values of .4 the means are (1 + 2) / 6, (.7 + 2) / 7 and (.4 + 2) / 6 = .4.
    first, second = 3 / 6, 2.7 / 7
    expected = [[0.0, (1 - first + 0 - second) / 2], [0.0, 0.0], [0.0, 0.7 - second]]
    torch.testing.assert_close(sums.opinions(deviation=0.5), torch.tensor(expected) / 0.5)
