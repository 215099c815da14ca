"""The keys under `ranking`: those of the chosen model, wherever its name stands, and no others."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from recsys.config import (
    Config,
    RankingSettings,
    RetrievalSettings,
    load_config,
    ranking_settings,
)
from recsys.config.limits import PositiveInt
from recsys.config.load import validate
from recsys.ranking.attention_models import DinDcnSettings, SimSettings
from tests.recsys.command_runs import TINY


def recipe(path: Path, **ranking: Any) -> Path:
    """A recipe with these keys under `ranking`."""
    path.write_text(yaml.safe_dump({"ranking": ranking}))
    return path


@pytest.mark.parametrize(
    "argv",
    [
        ["--ranking.name", "sim", "--ranking.search_top_k", "20"],
        ["--ranking.search_top_k=20", "--ranking.name=sim"],
        ["--ranking", "{name: sim, search_top_k: 20}"],
    ],
)
def test_the_name_decides_the_keys_wherever_it_stands(argv: list[str], tmp_path: Path) -> None:
    ranking = load_config(recipe(tmp_path / "recipe.yaml", dropout=0.1), argv).ranking
    assert ranking == SimSettings(search_top_k=20, dropout=0.1)


def test_a_key_of_another_model_is_refused_with_the_keys_of_this_one(tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yaml", name="din", search_top_k=20)
    with pytest.raises(ValueError, match=r"search_top_k .*'din'.*'attention_units'"):
        load_config(path)
    with pytest.raises(ValueError, match=r"tower_dim .*'sim'.*'search_heads'"):
        load_config(TINY, ["--ranking.name", "sim", "--ranking.tower_dim", "8"])
    with pytest.raises(ValueError, match=r"tower_dim .*'sim'.*'search_heads'"):
        ranking_settings("sim", tower_dim=8)


def test_what_a_recipe_sets_for_its_own_model_is_left_out_of_another_s(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe(tmp_path / "recipe.yaml", cross_layers=1, mlp_units=[8])
    with caplog.at_level(logging.WARNING, logger="recsys"):
        ranking = load_config(path, ["--ranking.name=dlrm"]).ranking
    assert ranking == ranking_settings("dlrm", mlp_units=[8])
    assert caplog.text.count("ranking.cross_layers: ") == 1
    with pytest.raises(ValueError, match=r"search_heads .*'dlrm'"):
        load_config(recipe(path, search_heads=3), ["--ranking.name=dlrm"])


@pytest.mark.parametrize("change", [{"dropout": 1.0}, {"mlp_units": [8, 0]}, {"cross_rank": 0}])
def test_settings_made_in_python_are_checked(change: dict[str, Any]) -> None:
    (name,) = change
    config = Config(ranking=replace(DinDcnSettings(), **change))
    with pytest.raises(ValueError, match=rf"ranking\.{name}.* is (0|1\.0);"):
        validate(config)


class Custom(nn.Module):
    """A ranking model of the user's, with settings of its own."""

    @dataclass
    class Settings(RankingSettings):
        """Its settings."""

        units: PositiveInt = 32
        """Units of the hidden layer."""


class WithoutSettings(nn.Module):
    """A ranking model of the user's that reads `settings.options`."""


def test_a_class_of_the_user_s_has_the_keys_of_its_settings() -> None:
    argv = ["--ranking.name", f"{__name__}:Custom", "--ranking.units", "16"]
    assert load_config(TINY, argv).ranking == Custom.Settings(argv[1], mlp_units=[16], units=16)
    with pytest.raises(ValueError, match=r"ranking.units is 0"):
        load_config(TINY, [*argv[:2], "--ranking.units=0"])
    with pytest.raises(ValueError, match=r"search_top_k .*Custom'; .*'units'"):
        load_config(TINY, [*argv, "--ranking.search_top_k=3"])


def test_a_class_of_the_user_s_without_settings_has_options() -> None:
    name = f"{__name__}:WithoutSettings"
    ranking = load_config(TINY, [f"--ranking={{name: '{name}', options: {{units: 3}}}}"]).ranking
    assert ranking == RetrievalSettings(name, options={"units": 3}, mlp_units=[16])
