"""The command line: `recsys COMMAND`, with a recipe, a dataset or a run.

Commands are doctor, prepare, explain-data, describe, cache, train, evaluate, predict, report,
compare and export-tables.

`cache`, `train`, `evaluate`, `predict` and `report` run alone or under torchrun and torchx
unchanged.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from recsys import doctor

# An abbreviated option would change its meaning when a setting with that beginning is added.
_Parser = partial(ArgumentParser, allow_abbrev=False)


def _parser() -> ArgumentParser:
    from recsys.config import add_config_arguments

    parser = _Parser(prog="recsys", description="Trains and runs EM3 recommenders.")
    commands = parser.add_subcommands()

    command = _Parser(description="Versions, devices and memory; how to mend what is wrong.")
    commands.add_subcommand("doctor", command)

    command = _Parser(description="Makes a dataset of a known source, or the maps of its ids.")
    commands.add_subcommand("prepare", command)
    sources = command.add_subcommands()
    source = _Parser(description="MovieLens -> the dataset format.")
    source.add_argument("--source", type=Path | None, help="a folder; default: the bundled sample")
    source.add_argument("--out", type=Path, required=True, help="folder of the dataset to write")
    source.add_argument(
        "--split",
        type=Literal["global", "user", "rolling"],
        default="global",
        help="global: one in time; user: each user's ratings in time; rolling: five windows",
    )
    source.add_argument("--history_length", type=int, default=20, help="longest history of a row")
    sources.add_subcommand("movielens", source)
    source = _Parser(description="The maps of raw ids for columns with an exact vocabulary.")
    source.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    sources.add_subcommand("vocabulary", source)

    _add_looks(commands)
    command = _Parser(description="Fills the caches of item content that a model trains with.")
    add_config_arguments(command)
    command.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    commands.add_subcommand("cache", command)

    _add_train(commands)
    _add_runs(commands)
    _add_export(commands)
    return parser


def _add_train(commands: Any) -> None:
    from recsys.config import add_config_arguments
    from recsys.run_folder import Resume

    command = _Parser(description="Trains a model; every setting can be overridden.")
    add_config_arguments(command)
    command.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    command.add_argument("--out", type=Path | None, help="folder of the run to write")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="build all and take one step; no --out is needed, and none is written",
    )
    command.add_argument(
        "--compare",
        type=Literal["id_only"] | None,
        help="id_only: train the same model without content, too, and compare both",
    )
    command.add_argument(
        "--resume",
        type=Resume,
        default="auto",
        help="auto: go on from the run's last checkpoint if there is one; never; must",
    )
    command.add_argument("--overwrite", type=bool, default=False, help="replace an earlier run")
    commands.add_subcommand("train", command)


def _add_runs(commands: Any) -> None:
    """Commands on a finished run."""
    command = _Parser(description="Metrics of a finished run on a split.")
    _add_run_arguments(command)
    command.add_argument("--split", type=str, default="test", help="train, valid or test")
    commands.add_subcommand("evaluate", command)

    command = _Parser(description="Adds predictions to Parquet files of impressions.")
    _add_run_arguments(command)
    command.add_argument("--input", type=str, nargs="+", required=True, help="files or folders")
    command.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    commands.add_subcommand("predict", command)
    command = _Parser(description="One HTML page on a finished run, figures inside.")
    _add_run_arguments(command)
    command.add_argument("--out", type=Path | None, help="file; default: RUN/report.html")
    command.add_argument(
        "--colour_by",
        type=str | None,
        help="column of the items' files that colours the maps; default: genres or category",
    )
    commands.add_subcommand("report", command)

    command = _Parser(description="Metrics of runs, and which differences the test users bear out.")
    command.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        required=True,
        help="finished runs; the others are compared to the first",
    )
    command.add_argument("--split", type=str, default="test", help="train, valid or test")
    command.add_argument("--out", type=Path | None, help="JSON file to write the numbers to")
    commands.add_subcommand("compare", command)


def _add_looks(commands: Any) -> None:
    """Commands that look before anything is trained."""
    from embeddings.simulated_cluster import FigureOverrides
    from recsys.config import add_config_arguments

    command = _Parser(description="What is in a dataset, and what to mend before training.")
    command.add_argument("data", type=str, help="dataset: folder or URL")
    command.add_argument(
        "--on_bad_row",
        type=Literal["error", "skip"],
        default="error",
        help="as in training: error ends with the first row that cannot be used",
    )
    command.add_argument("--json", type=Path | None, help="file to write the numbers to")
    commands.add_subcommand("explain-data", command)

    command = _Parser(description="What a run would be, on any cluster: sizes, plan, time.")
    add_config_arguments(command, skip=frozenset({"device"}))
    command.add_argument("--data", type=str, required=True, help="dataset: folder or URL")
    command.add_argument(
        "--device",
        type=str,
        default="auto",
        help="a100, h100, h200 or b200, which need not be there; auto, cpu or cuda: as here",
    )
    command.add_argument("--nodes", type=int, default=1, help="machines")
    command.add_argument(
        "--gpus-per-node",
        type=int | None,
        help="ranks of each machine; default: the GPUs that are here, or 1",
    )
    command.add_argument(
        "--rows",
        type=str,
        nargs="+",
        default=[],
        help="TABLE=NUMBER: other numbers of rows than in schema.yaml",
    )
    command.add_class_arguments(FigureOverrides, "figures")
    command.add_argument("--json", type=Path | None, help="file to write the numbers to")
    commands.add_subcommand("describe", command)


def _add_export(commands: Any) -> None:
    command = _Parser(description="Writes the ID tables of a run to one Parquet file.")
    command.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    command.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    command.add_argument("--table", type=str, nargs="+", help="tables by name; default: all")
    commands.add_subcommand("export-tables", command)


def _add_run_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--data", type=str | None, help="dataset; default: the run's own")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")


def _prepare(arguments: Namespace) -> None:
    from recsys.data.movielens import format_summary, prepare_movielens
    from recsys.data.prepare_vocabulary import format_prepared, prepare_vocabularies

    if arguments.subcommand == "vocabulary":
        print(format_prepared(prepare_vocabularies(arguments.vocabulary.data)))
        return
    chosen = arguments.movielens
    summary = prepare_movielens(chosen.source, chosen.out, chosen.history_length, chosen.split)
    print(format_summary(summary))
    print(f"written to {chosen.out}")


def _explain_data(arguments: Namespace) -> None:
    from recsys.explain.command import explain_data

    explain_data(arguments.data, arguments.on_bad_row, arguments.json)


def _describe(arguments: Namespace) -> None:
    from recsys.config import config_from
    from recsys.describe.command import describe_run, device_of_config

    device = arguments.device
    arguments.device = device_of_config(device)
    describe_run(
        config_from(arguments),
        arguments.data,
        device,
        arguments.nodes,
        arguments.gpus_per_node,
        arguments.rows,
        arguments.figures,
        arguments.json,
    )


def _cache(arguments: Namespace) -> None:
    from recsys.cache_command import fill_caches
    from recsys.config import config_from
    from recsys.ranks import joined_ranks

    config = config_from(arguments)
    with joined_ranks(config.device) as ranks:
        fill_caches(config, arguments.data, ranks)


def _train(arguments: Namespace) -> None:
    from recsys.config import config_from
    from recsys.dry_run import dry_run
    from recsys.id_only_twin import id_only_twin, train_with_twin
    from recsys.ranks import joined_ranks
    from recsys.training import train

    config = config_from(arguments)
    configs = [config] if arguments.compare is None else [config, id_only_twin(config)]
    if not arguments.dry_run and arguments.out is None:
        raise ValueError("train needs --out, the folder of the run to write (or --dry-run)")
    with joined_ranks(config.device) as ranks:
        if arguments.dry_run:
            for each in configs:
                dry_run(each, arguments.data, ranks)
            return
        start = train if arguments.compare is None else train_with_twin
        start(config, arguments.data, arguments.out, ranks, arguments.overwrite, arguments.resume)


def _evaluate(arguments: Namespace) -> None:
    from recsys.prediction import evaluate
    from recsys.ranks import joined_ranks

    with joined_ranks(arguments.device) as ranks:
        evaluate(arguments.run, arguments.data, arguments.split, ranks, arguments.device)


def _predict(arguments: Namespace) -> None:
    from recsys.prediction import predict
    from recsys.ranks import joined_ranks

    with joined_ranks(arguments.device) as ranks:
        predict(
            arguments.run, arguments.input, arguments.out, arguments.data, ranks, arguments.device
        )


def _report(arguments: Namespace) -> None:
    from recsys.ranks import joined_ranks
    from recsys.report.command import report_run

    with joined_ranks(arguments.device) as ranks:
        report_run(
            arguments.run,
            arguments.data,
            arguments.out,
            ranks,
            arguments.device,
            arguments.colour_by,
        )


def _compare(arguments: Namespace) -> None:
    from recsys.compare import compare_runs, format_comparison, write_comparison

    report = compare_runs(arguments.runs, arguments.split)
    print(format_comparison(report))
    if arguments.out is not None:
        write_comparison(report, arguments.out)
        print(f"written to {arguments.out}")


def _export_tables(arguments: Namespace) -> None:
    from recsys.table_export import export_tables

    if not (arguments.run / "metrics.json").is_file():
        raise ValueError(f"{arguments.run}: holds no finished run (metrics.json); train it first")
    counts = export_tables(arguments.run / "checkpoints" / "best", arguments.out, arguments.table)
    for name, rows in counts.items():
        print(f"table {name}: {rows:,} rows")
    print(f"written to {arguments.out}")


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "prepare": _prepare,
    "explain-data": _explain_data,
    "describe": _describe,
    "cache": _cache,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "report": _report,
    "compare": _compare,
    "export-tables": _export_tables,
}


def _silence_advice_to_library_developers() -> None:
    """Deprecations inside torch and TorchRec, which users of this program cannot mend."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of loading weights, per rank


def main(words: list[str] | None = None) -> int:
    """Runs one command; a user's error is one line and exit code 1."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["doctor"]:  # must work where nothing else can be imported
        return doctor.main()
    _silence_advice_to_library_developers()
    try:
        doctor.require_working_installation()
        return _run(words)
    except (ValueError, OSError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # One write, or the lines of several ranks would run into each other.
        sys.stderr.write(f"{rank}error: {error}\n")
        return 1


def _run(words: list[str]) -> int:
    from recsys.lockstep import TrainingStopped

    parser = _parser()
    if not words:
        parser.print_help()
        return 2
    arguments = parser.instantiate(parser.parse_args(words))
    try:
        COMMANDS[arguments.subcommand](arguments[arguments.subcommand])
    except TrainingStopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
