"""Recipes and runs of earlier releases are read, and a warning names what they lose."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys.config import Config, load_config
from recsys.config.load import config_of_plain, to_plain
from tests.recsys.command_runs import TINY

FORMER: dict[str, Any] = {
    "neighbours": {"dim": 4, "decay": {"half_life": 9, "ages": "history_age"}},
    "embedding": {"tables": {"item": {"new_rows": "content"}, "user": {"new_rows": "zero"}}},
}


def assert_present(config: Config) -> None:
    assert config.neighbours is not None and config.neighbours.dim == 4
    tables = config.embedding.tables
    assert (tables["item"].new_rows, tables["user"].new_rows) == ("mean", "zero")


def test_a_recipe_with_removed_settings_is_read_with_a_warning_of_each(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(TINY.read_text()) | FORMER))
    with (
        pytest.warns(FutureWarning, match=r"neighbours\.decay: has no effect"),
        pytest.warns(FutureWarning, match=r"tables\.item\.new_rows: content is no value: mean"),
    ):
        config = load_config(recipe)
    assert_present(config)


def test_settings_of_a_stored_model_are_read(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        assert_present(config_of_plain(to_plain(load_config(TINY)) | FORMER))


def test_a_removed_setting_that_was_off_is_left_out_in_silence(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"neighbours": {"dim": 4, "decay": None}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = load_config(recipe)
    assert config.neighbours is not None and config.neighbours.dim == 4


def test_an_option_of_a_removed_setting_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"neighbours\.decay is no setting"):
        load_config(TINY, ["--neighbours", "{decay: {half_life: 9, ages: history_age}}"])
    with pytest.raises(ValueError, match=r"neighbours\.decay is no setting"):
        load_config(TINY, ["--neighbours.decay.half_life", "9"])
    with pytest.raises(ValueError, match=r"new_rows is content; it must be one of"):
        load_config(TINY, ["--embedding.tables", "{item: {new_rows: content}}"])
