"""A ranking model of the user's, in one file and one line of YAML: trained and evaluated."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from recsys.cli import main
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY, train_words

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
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset, the model and a recipe, from which Python imports."""
    write_dataset(tmp_path / "data")
    (tmp_path / "my_backbone.py").write_text(OWN_MODEL)
    recipe = yaml.safe_load(TINY.read_text())
    recipe["ranking"] = {"name": "my_backbone:OfTarget", "units": 3}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_backbone_of_one_s_own_trains_with_settings_of_its_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recipe = place / "run", ["--config", str(place / "own.yaml")]
    assert main(train_words(place / "data", run, *recipe)) == 0
    assert json.loads((run / "metrics.json").read_text())["test"]["auc"] > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["ranking"]["units"] == 3
    assert main(["evaluate", "--run", str(run), "--split", "test"]) == 0
    capsys.readouterr()
    assert main(["train", *recipe, "--data", "data", "--ranking.cross_rank", "4"]) == 1
    assert re.search("ranking.cross_rank .*'my_backbone:OfTarget'", capsys.readouterr().err)
