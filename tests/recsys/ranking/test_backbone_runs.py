"""Every backbone trains, checkpoints, resumes and evaluates with every content on ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys.ranking import RANKING_MODELS
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import assert_same_metrics
from tests.recsys.ranking.backbone_runs import (
    BACKBONES,
    CONTENTS,
    Content,
    Ran,
    logits_by_plan,
    run_backbones,
)

Case = tuple[str, Content]
MATRIX: list[Case] = [(backbone, content) for backbone in BACKBONES for content in CONTENTS]
PLANS = ["row_wise", "table_wise", "column_wise"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    write_dataset(folder / "data")
    return folder


def check(case: Case, ran: Ran) -> None:
    """The run that was stopped made all 6 steps and ended where the other did."""
    assert ran.steps == 6, case
    assert_same_metrics(ran.stopped, ran.straight)
    assert_same_metrics(ran.evaluated, ran.stopped)
    assert ran.stopped["num_samples"] == 20 and 0 < ran.stopped["logloss"] < 10, case
    assert ("retrieval" in ran.stopped) == case[0].startswith("two_tower"), case


def test_every_backbone_of_the_package_is_run() -> None:
    assert {backbone.split()[0] for backbone in BACKBONES} == set(RANKING_MODELS)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_backbone_trains_checkpoints_resumes_and_evaluates_with_every_content(
    folder: Path, world_size: int
) -> None:
    for ran in run_on_ranks(run_backbones, world_size, folder, MATRIX):
        for case in MATRIX:
            check(case, ran[case])


def test_logits_do_not_depend_on_the_sharding_plan(folder: Path) -> None:
    names = sorted(RANKING_MODELS)
    logits, _ = run_on_ranks(logits_by_plan, 2, folder, names, PLANS)  # those of rank 0
    for name in names:
        first = logits[name, PLANS[0]]
        assert len(set(first.flatten().tolist())) > 10, name
        for plan in PLANS[1:]:
            assert (logits[name, plan] - first).abs().max() == 0.0, (name, plan)
