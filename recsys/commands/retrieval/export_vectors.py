"""Runs `recsys export-vectors`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from recsys.commands.options import add_log_options, require_finished
from recsys.doctor import require_working_installation

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the run, the folder, the kind of vectors and of index."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a finished run")
    add("--out", type=Path, required=True, help="a folder to make")
    add(
        "--vectors",
        type=Literal["content", "item_tower"] | None,
        help="content: of any model with content; item_tower: of two_tower, with its user tower; "
        "default: item_tower of two_tower, else content",
    )
    text = "also build a FAISS index: flat (exact), ivf or hnsw; needs the extra `retrieve`"
    add("--index", type=Literal["flat", "ivf", "hnsw"] | None, help=text)
    add("--data", type=str | None, help="dataset; default: the run's own")
    add_log_options(parser)


def run(arguments: Namespace) -> None:
    """Write the vectors."""
    arguments.run = require_finished(arguments.run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.serving.retrieval.vectors_folder import export_vectors

    with joined_ranks("cpu") as ranks:
        manifest = export_vectors(
            arguments.run, arguments.out, arguments.vectors, arguments.index, ranks, arguments.data
        )
    size = f"{manifest.num_items:,} x {manifest.dim}"
    index = "no index" if manifest.index is None else f"index {manifest.index}"
    logger.info("%s: %s vectors %s, %s", arguments.out, manifest.vectors, size, index)
