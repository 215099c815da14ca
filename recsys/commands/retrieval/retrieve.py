"""Runs `recsys retrieve`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from recsys.commands.options import add_log_options

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the folder of vectors, the requests and the output."""
    add = parser.add_argument
    add("--package", type=Path, required=True, help="folder of export-vectors, with an index")
    text = "Parquet files with a request in each row, or folders of them; or .json files"
    add("--input", type=str, nargs="+", required=True, help=text)
    add("--out", type=Path | None, help="Parquet file to write; default: a JSON line per request")
    add("--top_k", type=PositiveInt, default=100, help="items of each request")
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Write the retrieved items."""
    from recsys.serving.retrieval import Retriever
    from recsys.serving.retrieval.retrieve_files import retrieve_files

    retriever = Retriever.load(arguments.package)
    total = retrieve_files(retriever, arguments.input, arguments.top_k, arguments.out)
    if arguments.out is not None:
        logger.info("%s: items of %s requests", arguments.out, f"{total:,}")
