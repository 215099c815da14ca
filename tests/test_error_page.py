"""The page of errors is up to date, and each text names thing, value and fix in three lines."""

import re

import pytest

from tests import error_page
from tests.error_calls import Case

MOST_LINES, FEWEST_TEXTS = 3, 60
# What to do follows a semicolon or a first sentence, or is the limit itself.
FIX = re.compile(r"; \w|\. [A-Z]|it must (be|lie) ")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[tuple[Case, str]]]:
    return error_page.texts()


def test_the_page_is_up_to_date(texts: dict[str, list[tuple[Case, str]]]) -> None:
    assert error_page.PAGE.read_text() == error_page.page(texts), "run python -m tests.error_page"


def test_every_text_names_thing_value_and_fix_in_three_lines(
    texts: dict[str, list[tuple[Case, str]]],
) -> None:
    rows = [row for section in texts.values() for row in section]
    assert len(rows) >= FEWEST_TEXTS
    for case, text in rows:
        assert [name for name in case.names if name not in text] == [], text
    assert [text for _, text in rows if not FIX.search(text)] == []
    assert [text for _, text in rows if len(text.splitlines()) > MOST_LINES] == []
