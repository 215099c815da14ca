"""Settings write what they need once, and share the items that they have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.settings import setting
from recsys.config import load_config


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("quick", [False, True])
def test_recipes_are_valid(name: str, quick: bool) -> None:
    sized = setting(name, quick)
    config = load_config(sized.recipe, list(sized.overrides))
    assert config.content != "none" and config.device == "cpu"
    assert config.content.history.mode == "bank_lora"
    assert config.checkpoint.every_seconds is None  # none falls due while steps are timed


def test_datasets_that_differ_in_their_rows_share_the_file_of_their_items(tmp_path: Path) -> None:
    sized = setting("A", quick=True)
    folders = [
        Path(sized.prepared(tmp_path)[0])
        for sized in (sized, sized.with_data(history=3), sized.with_data(num_items=30))
    ]
    assert len(set(folders)) == 3
    items = [(folder / "items" / "part-0.parquet").stat().st_ino for folder in folders]
    assert items[0] == items[1] != items[2]
