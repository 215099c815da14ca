"""`recsys cache` fills what `recsys train` then finds, alone and on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from recsys.cli import main
from recsys.config import ModalitySettings, load_config, save_config
from recsys.data.items.ragged_array import RaggedArray
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY, run_recsys, train_words
from tests.recsys.content.cache.frozen_outputs import modality_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cache_command") / "data")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The tiny recipe with image encoders of every kind and a feature beside its text."""
    config = load_config(TINY)
    assert config.content != "none"
    config.content.modalities |= {
        "poster": modality_of("poster", "frozen"),
        "trained": modality_of("poster", "full"),
        "uncached": modality_of("poster", "frozen"),
        "clip": ModalitySettings(kind="feature", column="clip"),
    }
    config.content.modalities["uncached"].cache_frozen_layers = False
    save_config(config, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def cache_words(data: Path, config: Path, cache: Path) -> list[str]:
    words = ["cache", "--config", str(config), "--data", str(data), "--cache", str(cache)]
    return [*words, "--device", "cpu"]


def test_each_modality_is_told_with_its_folder_and_found_by_the_next(
    data: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = cache_words(data, recipe, tmp_path / "cache")
    assert main(words) == 0
    output = capsys.readouterr().out
    where = re.escape(str(tmp_path / "cache"))
    encoded = r"; 25 encoded in \d+\.\d s, [\d,]+ items/s\n"
    assert re.search(rf"\ntext: 28 items, [\d,]+ bytes in {where}/frozen-text-\w+{encoded}", output)
    assert re.search(rf"\nposter: 29 items, [\d,]+ bytes in {where}/frozen-poster-\w+;", output)
    assert re.search(rf"\ntrained: 29 items, .* in {where}/image-\w+; ", output)
    assert re.search(r"\nuncached: 29 items, .*; cache_frozen_layers is false", output)
    assert re.search(rf"\nclip: 29 items, .* in {where}/feature-\w+; ", output)
    assert main(words) == 0
    output = capsys.readouterr().out
    assert output.count("was already there") == 2
    assert "encod" not in output.replace("encoder", "")


def test_train_finds_what_cache_has_filled(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(cache_words(data, TINY, tmp_path / "cache")) == 0
    assert "encoding 'text'" in capsys.readouterr().out
    assert main(train_words(data, tmp_path / "run")) == 0
    assert "encoding" not in capsys.readouterr().out


def test_two_ranks_fill_the_same_bits_as_one(data: Path, tmp_path: Path) -> None:
    assert main(cache_words(data, TINY, tmp_path / "alone")) == 0
    process = run_recsys(*cache_words(data, TINY, tmp_path / "both"), ranks=2)
    assert process.returncode == 0, process.stderr
    assert len(re.findall(r"^text: 28 items", process.stdout, re.MULTILINE)) == 1
    (alone,), (shared,) = (list((tmp_path / name).glob("frozen-*")) for name in ("alone", "both"))
    assert alone.name == shared.name
    assert np.array_equal(RaggedArray(alone).values, RaggedArray(shared).values)
    assert np.array_equal(RaggedArray(alone).offsets, RaggedArray(shared).offsets)
