"""The search ranks sets of settings by validation, shows no test figure, and is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.__main__ import quality
from benchmarks.quality.search import read_candidates
from tests.benchmarks.quality.quality_cells import write_runs, write_windows
from tests.recsys.command_runs import TINY


def test_the_best_in_validation_is_first_and_test_figures_are_not_shown(tmp_path: Path) -> None:
    data, runs = write_windows(tmp_path / "data"), tmp_path / "runs"
    write_runs(data, runs)
    file = tmp_path / "search.yaml"
    file.write_text("without content: {content: none}\nrecipe: {}\n")

    quality(
        str(data), runs, seeds=2, search=file, recipe=TINY, results=tmp_path / "results" / "search"
    )

    text = (tmp_path / "results" / "search.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[1:] == [
        "| recipe | 2 | 0.6500 | 0.7500 | 0.6500 | – |  |",
        '| without content | 2 | 0.4500 | 0.5500 | 0.4500 | – | `{"content": "none"}` |',
    ]
    assert "0.123" not in text and "test metric" in text
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["search.md"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--search .*search.yaml"),
        ("- recipe", "--search .*search.yaml"),
        ("wide: 64", "'wide' is 64"),
        ("wide: {}\nwide: {}", "key 'wide' is twice"),
    ],
)
def test_a_file_that_is_not_of_names_and_settings_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_candidates(file)


def test_a_file_or_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.yaml"):
        read_candidates(tmp_path / "nothing.yaml")
    file = tmp_path / "search.yaml"
    file.write_text("recipe: {}\nwide: {content.dim: 64}\n")
    with pytest.raises(ValueError, match=r"\['deep'\].*\['recipe', 'wide'\]"):
        read_candidates(file, ["deep"])
    assert read_candidates(file, ["wide"]) == {"wide": {"content.dim": 64}}
