"""Backbones train, resume and evaluate, those of users too."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import yaml

from recsys.cli import main
from recsys.ranking import RANKING_MODELS
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY, assert_same_metrics, train_argv
from tests.recsys.ranking.backbone_runs import (
    BACKBONES,
    CONTENTS,
    Content,
    Ran,
    logits_by_plan,
    run_backbones,
)

Case = tuple[str, Content]
# On two ranks each backbone with one content, and on one rank with the others.
ON_TWO: list[Case] = [(backbone, CONTENTS[i % 3]) for i, backbone in enumerate(BACKBONES)]
ON_ONE = [case for case in product(BACKBONES, CONTENTS) if case not in ON_TWO]
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
    assert ("retrieval" in ran.stopped) == case[0].startswith(("two_tower", "generative")), case


def test_every_backbone_of_the_package_is_run() -> None:
    assert {backbone.split()[0] for backbone in BACKBONES} == set(RANKING_MODELS)


@pytest.mark.long
@pytest.mark.parametrize(("world_size", "cases"), [(1, ON_ONE), (2, ON_TWO)])
def test_every_backbone_trains_checkpoints_resumes_and_evaluates_with_every_content(
    folder: Path, world_size: int, cases: list[Case]
) -> None:
    for ran in run_on_ranks(run_backbones, world_size, folder, cases):
        for case in cases:
            check(case, ran[case])


def test_logits_do_not_depend_on_the_sharding_plan(folder: Path) -> None:
    names = sorted(RANKING_MODELS)
    logits, _ = run_on_ranks(logits_by_plan, 2, folder, names, PLANS)  # those of rank 0
    for name in names:
        first = logits[name, PLANS[0]]
        assert len(set(first.flatten().tolist())) > 10, name
        for plan in PLANS[1:]:
            assert (logits[name, plan] - first).abs().max() == 0.0, (name, plan)


OWN_MODEL = '''
"""The target's vector through a hidden layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recsys.config import RankingSettings


class OfTarget(nn.Module):
    @dataclass
    class Settings(RankingSettings):
        units: int = 32
        """Units of the only hidden layer."""

    def __init__(self, settings, dimensions, content):
        super().__init__()
        self.hidden = nn.Linear(dimensions.id_dim, settings.units)
        self.top = nn.Linear(settings.units, dimensions.num_labels)

    def forward(self, ids, content, batch):
        return self.top(self.hidden(ids.target).relu())
'''


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset, the model and a recipe, from which Python imports."""
    write_dataset(tmp_path / "data")
    (tmp_path / "my_backbone.py").write_text(OWN_MODEL)
    recipe = yaml.safe_load(TINY.read_text())
    recipe["ranking"] = {"name": "my_backbone:OfTarget", "units": 3}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_backbone_of_one_s_own_trains_with_settings_of_its_own(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recipe = workdir / "run", ["--config", str(workdir / "own.yaml")]
    assert main(train_argv(workdir / "data", run, *recipe)) == 0
    assert json.loads((run / "metrics.json").read_text())["test"]["auc"] > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["ranking"]["units"] == 3
    assert main(["evaluate", "--run", str(run), "--split", "test"]) == 0
    capsys.readouterr()
    assert main(["train", *recipe, "--data", "data", "--ranking.cross_rank", "4"]) == 1
    assert re.search("ranking.cross_rank .*'my_backbone:OfTarget'", capsys.readouterr().err)
