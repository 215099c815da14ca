"""Settings write what they need once, and share the items that they have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.settings import setting
from recsys.config import load_config


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("quick", [False, True])
def test_recipes_are_valid(name: str, quick: bool) -> None:
    chosen = setting(name, quick)
    config = load_config(chosen.recipe, list(chosen.overrides))
    assert config.content != "none" and config.device == "cpu"
    assert config.content.history.mode == "bank_lora"
    assert config.checkpoint.every_seconds is None  # none falls due while steps are timed


def test_setting_a_has_the_sizes_that_its_figures_are_for() -> None:
    size, config = setting("A").size, load_config(setting("A").recipe)
    assert (size.num_items, size.history, size.text_dim, size.image_dim) == (100_000, 50, 384, 1280)
    assert config.content != "none"
    assert (config.batch_size, config.content.dim, config.embedding.dim) == (512, 64, 64)
    assert config.contrastive.weight == 0.05


def test_datasets_that_differ_in_their_rows_share_the_file_of_their_items(tmp_path: Path) -> None:
    chosen = setting("A", quick=True)
    folders = [
        Path(sized.prepared(tmp_path)[0])
        for sized in (chosen, chosen.with_data(history=3), chosen.with_data(num_items=30))
    ]
    assert len(set(folders)) == 3
    items = [(folder / "items" / "part-0.parquet").stat().st_ino for folder in folders]
    assert items[0] == items[1] != items[2]


def test_a_dataset_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    chosen = setting("B", quick=True)
    train = Path(chosen.prepared(tmp_path)[0]) / "train" / "part-0.parquet"
    written = train.stat().st_mtime_ns
    chosen.prepared(tmp_path)
    assert train.stat().st_mtime_ns == written


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="setting 'C' is unknown"):
        setting("C")
