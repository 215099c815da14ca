"""The number of groups of users in votes follows the users, and a run keeps its number."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recsys.config import load_config
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.ranking.layers.collaborative_filtering import CollaborativeFiltering, automatic_groups
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
            of for of in job.em3.ranking.modules() if isinstance(of, CollaborativeFiltering)
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
