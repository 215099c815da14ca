"""Runs `recsys search`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from recsys.commands.options import require_schema
from recsys.config import add_config_arguments, config_from
from recsys.config.parser import Parser
from recsys.distributed.log import print_table
from recsys.doctor import require_working_installation
from recsys.extras import missing_extra

if TYPE_CHECKING:
    from recsys.search.search import Search

SHOWN = 10  # best trials


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the settings of the recipe, the space, and the numbers of trials and jobs."""
    add_config_arguments(parser, words)
    add = parser.add_argument
    text = "datasets: folders or URLs; a trial's value is the mean over them"
    add("--data", type=str, nargs="+", required=True, help=text)
    add("--space", type=Path, required=True, help="YAML file of settings and their values")
    add("--out", type=Path, required=True, help="folder of the search")
    text = "number of trials, those of earlier commands on the folder included"
    add("--trials", type=PositiveInt, required=True, help=text)
    add("--jobs", type=PositiveInt, default=1, help="trials side by side")
    add("--seeds", type=PositiveInt, default=1, help="runs of each trial and dataset")
    add("--nproc", type=PositiveInt, default=1, help="ranks of each run")
    text = "rule that proposes values: tpe learns from earlier trials, grid tries all"
    add("--sampler", type=Literal["tpe", "random", "grid"], default="tpe", help=text)
    text = "stop trials that are worse than the median of others at the same validation"
    add("--prune", type=bool, default=True, help=text)
    text = "trials whose checkpoints are kept"
    add("--keep_checkpoints", type=Literal["best", "all"], default="best", help=text)


def run(arguments: Namespace) -> int:
    """Search, and print the best trials; return the exit code.

    Raises:
        ValueError: recipe, space or data are invalid, or Optuna is not installed.
    """
    config = config_from(arguments)
    for data in arguments.data:
        require_schema(data)
    require_working_installation()
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise missing_extra("search", "recsys search", error) from error
    from recsys.search.search import Request, Search
    from recsys.search.space import read_space
    from recsys.search.trial_runs import SearchStopped

    numbers = arguments.trials, arguments.jobs, arguments.seeds, arguments.nproc
    request = Request(*numbers, arguments.sampler, arguments.prune, arguments.keep_checkpoints)
    space = read_space(arguments.space)
    search = Search(config, space, arguments.data, arguments.out, request)
    try:
        search.run()
    except SearchStopped:
        sys.stderr.write(f"asked to end; the same command goes on with {arguments.out}\n")
        return 128 + signal.SIGTERM
    _show(search)
    return 0


def _show(search: Search) -> None:
    """Print the best trials, and the command that trains with the best configuration."""
    from embeddings.plan_text import align_columns
    from recsys.evaluation.model_selection import selection_words
    from recsys.search.search import BEST

    best = search.ranking()[:SHOWN]
    names = [parameter.name for parameter in search.space]
    rows = [["trial", selection_words(search.config.best_model_by), *names]]
    for trial in best:
        values = [str(trial.params[name]) for name in names]
        rows.append([str(trial.number), f"{trial.values[0]:.4f}", *values])
    print_table(align_columns(rows))
    if best:
        command = f"recsys train --config {search.out / BEST} --data {search.data[0]}"
        print_table(f"\n{command} --out RUN")
