"""A text file appears whole or not at all."""

from pathlib import Path

import pytest

from recsys.data.filesystem import write_whole


def test_the_text_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "page.html", "é\n")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == "é\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(page, "new \ud800")  # a lone surrogate has no UTF-8
    assert page.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
