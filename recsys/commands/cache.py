"""Runs `recsys cache`."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from recsys.commands.options import add_data_option, require_schema
from recsys.config import add_config_arguments, config_from
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the settings of a run, and the dataset."""
    add_config_arguments(parser, words)
    add_data_option(parser)


def run(arguments: Namespace) -> None:
    """Fill the caches. A collective."""
    config = config_from(arguments)
    require_schema(arguments.data)
    require_working_installation()
    from recsys.content.fill_caches import fill_caches
    from recsys.distributed.ranks import joined_ranks

    with joined_ranks(config.device) as ranks:
        fill_caches(config, arguments.data, ranks)
