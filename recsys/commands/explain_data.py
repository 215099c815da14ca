"""Runs `recsys explain-data DATA`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from recsys.commands.options import add_log_options
from recsys.config.parser import Parser


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the dataset and the options."""
    add = parser.add_argument
    add("data", type=str, help="dataset: folder or URL")
    text = "as in training: error ends with the first row that cannot be used"
    add("--on_bad_row", type=Literal["error", "skip"], default="error", help=text)
    add("--json", type=Path | None, help="file to write the numbers to")
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Print the description of the dataset."""
    from recsys.diagnostics.dataset.command import explain_data

    explain_data(arguments.data, arguments.on_bad_row, arguments.json)
