"""Runs `recsys doctor`."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from recsys import doctor
from recsys.config.parser import Parser


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add nothing: the command has no options."""


def run(arguments: Namespace) -> int:
    """Print the report; return 1 if there is a problem, else 0."""
    return doctor.main()
