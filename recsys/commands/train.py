"""Runs `recsys train`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from recsys.commands.options import add_data_option, require_schema
from recsys.config import Config, Resume, add_config_arguments, config_from
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation

if TYPE_CHECKING:
    from recsys.checkpoint.warm_start.request import WarmStart


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the settings of a run, the dataset, and the options of the run's folder."""
    add_config_arguments(parser, words)
    add_data_option(parser)
    add = parser.add_argument
    add("--out", type=Path | None, help="folder of the run to write")
    text = "build all and take one step; no --out is needed, and none is written"
    add("--dry-run", action="store_true", help=text)
    text = "id_only: train the same model without content, too, and compare both"
    add("--compare", type=Literal["id_only"] | None, help=text)
    text = "auto: go on from the run's last checkpoint if there is one; never; must"
    add("--resume", type=Resume, default="auto", help=text)
    add("--overwrite", type=bool, default=False, help="replace an earlier run")
    _add_warm_start(parser)


def _add_warm_start(parser: Parser) -> None:
    """Add the run whose state a new run begins with, and what of it is taken over."""
    add = parser.add_argument
    add("--warm-start", type=Path | None, help="begin with the state of this run, on other data")
    add(
        "--warm-start.checkpoint",
        dest="warm_start_checkpoint",
        type=Literal["best", "last"],
        default="best",
        help="its best model or its last checkpoint",
    )
    for name, words in (("only", "that alone are taken over"), ("skip", "that begin anew")):
        add(
            f"--warm-start.{name}",
            dest=f"warm_start_{name}",
            type=str,
            nargs="+",
            default=[],
            help=f"patterns of parameters {words}, such as 'content.*'",
        )
    text = "take over the state of the optimizers, too"
    add("--warm-start.optimizer", dest="warm_start_optimizer", type=bool, default=True, help=text)


def run(arguments: Namespace) -> int:
    """Train, or try it with `--dry-run`; return the exit code. A collective."""
    config = config_from(arguments)
    if not arguments.dry_run and arguments.out is None:
        raise ValueError("train needs --out, the folder of the run to write (or --dry-run)")
    if arguments.warm_start is not None and (arguments.dry_run or arguments.compare):
        raise ValueError("--warm-start begins a run: leave out --dry-run and --compare")
    require_schema(arguments.data)
    require_working_installation()
    from recsys.distributed.lockstep import TrainingStopped

    try:
        _train(config, arguments)
    except TrainingStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{stopped}\n")
        return 128 + signal.SIGTERM
    return 0


def _train(config: Config, arguments: Namespace) -> None:
    """Train the model, and its ID-only twin to compare it with. A collective."""
    from recsys.distributed.ranks import joined_ranks
    from recsys.training.dry_run import dry_run
    from recsys.training.id_only_twin import id_only_twin, train_with_twin
    from recsys.training.train import train

    configs = [config] if arguments.compare is None else [config, id_only_twin(config)]
    with joined_ranks(config.device) as ranks:
        if arguments.dry_run:
            for each in configs:
                dry_run(each, arguments.data, ranks)
            return
        of_run = config, arguments.data, arguments.out, ranks, arguments.overwrite, arguments.resume
        if arguments.compare is None:
            train(*of_run, _warm_start(arguments))
        else:
            train_with_twin(*of_run)


def _warm_start(arguments: Namespace) -> WarmStart | None:
    """Return what `--warm-start` asks for; None without it."""
    from recsys.checkpoint.partitions.state import newest_run
    from recsys.checkpoint.warm_start.request import WarmStart

    asked = WarmStart(
        Path() if arguments.warm_start is None else newest_run(arguments.warm_start),
        arguments.warm_start_checkpoint,
        tuple(arguments.warm_start_only),
        tuple(arguments.warm_start_skip),
        arguments.warm_start_optimizer,
    )
    if arguments.warm_start is not None:
        return asked
    if asked != WarmStart(Path()):
        raise ValueError("--warm-start.* say what is taken of a run; add --warm-start RUN")
    return None
