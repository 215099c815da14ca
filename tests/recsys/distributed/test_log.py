"""Rank 0 logs from info on, the others from warning on; as text for people or JSON lines."""

import json
import logging

import pytest

from recsys.distributed.log import configure_logging, print_table

logger = logging.getLogger("recsys.any")


def logged(capsys: pytest.CaptureFixture[str], rank: int, *settings: str) -> list[str]:
    """The lines of a debug, an info and a warning message."""
    configure_logging(rank, *settings)  # type: ignore[arg-type]
    logger.debug("detail")
    logger.info("step %d", 3)
    logger.warning("slow")
    return capsys.readouterr().out.splitlines()


def test_rank_0_says_what_happens_and_marks_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, 0) == ["step 3", "warning: rank 0: slow"]


def test_other_ranks_say_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, 1) == ["warning: rank 1: slow"]


@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("warning", 1), ("error", 0)])
def test_a_level_holds_for_all_ranks(
    capsys: pytest.CaptureFixture[str], level: str, lines: int
) -> None:
    assert len(logged(capsys, 1, level)) == lines


def test_json_lines_have_level_source_rank_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = (json.loads(line) for line in logged(capsys, 2, "info", "json"))
    assert first.pop("asctime")
    assert first == {"levelname": "INFO", "name": "recsys.any", "message": "step 3", "rank": 2}


def test_tables_are_printed_whatever_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, "error", "json")
    print_table("a  b\n1  2")
    assert capsys.readouterr().out == "a  b\n1  2\n"
