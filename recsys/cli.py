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

from jsonargparse import Namespace

from recsys import doctor

logger = logging.getLogger(__name__)


def _prepare(arguments: Namespace) -> None:
    """Run `recsys prepare`."""
    from recsys.data.movielens.prepare import format_summary, prepare_movielens
    from recsys.data.prepare_vocabulary import format_prepared, prepare_vocabularies
    from recsys.distributed.log import print_table

    if arguments.subcommand == "vocabulary":
        print_table(format_prepared(prepare_vocabularies(arguments.vocabulary.data)))
        return
    chosen = arguments.movielens
    summary = prepare_movielens(chosen.source, chosen.out, chosen.history_length, chosen.split)
    print_table(format_summary(summary))
    logger.info("written to %s", chosen.out)


def _explain_data(arguments: Namespace) -> None:
    """Run `recsys explain-data`."""
    from recsys.diagnostics.dataset.command import explain_data

    explain_data(arguments.data, arguments.on_bad_row, arguments.json)


def _describe(arguments: Namespace) -> None:
    """Run `recsys describe`."""
    from recsys.config import config_from
    from recsys.diagnostics.plan.command import describe_run, device_of_config

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
    """Run `recsys cache`. A collective."""
    from recsys.config import config_from
    from recsys.content.fill_caches import fill_caches
    from recsys.distributed.ranks import joined_ranks

    config = config_from(arguments)
    with joined_ranks(config.device) as ranks:
        fill_caches(config, arguments.data, ranks)


def _train(arguments: Namespace) -> None:
    """Run `recsys train`. A collective."""
    from recsys.config import config_from
    from recsys.distributed.ranks import joined_ranks
    from recsys.training.dry_run import dry_run
    from recsys.training.id_only_twin import id_only_twin, train_with_twin
    from recsys.training.train import train

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
    """Run `recsys evaluate`. A collective."""
    from recsys.distributed.ranks import joined_ranks
    from recsys.evaluation.predict import evaluate

    with joined_ranks(arguments.device) as ranks:
        evaluate(arguments.run, arguments.data, arguments.split, ranks, arguments.device)


def _predict(arguments: Namespace) -> None:
    """Run `recsys predict`. A collective."""
    from recsys.distributed.ranks import joined_ranks
    from recsys.evaluation.predict import predict

    with joined_ranks(arguments.device) as ranks:
        predict(
            arguments.run, arguments.input, arguments.out, arguments.data, ranks, arguments.device
        )


def _report(arguments: Namespace) -> None:
    """Run `recsys report`. A collective."""
    from recsys.diagnostics.run_report.command import report_run
    from recsys.distributed.ranks import joined_ranks

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
    """Run `recsys compare`."""
    from recsys.distributed.log import print_table
    from recsys.evaluation.compare import compare_runs, format_comparison, write_comparison

    report = compare_runs(arguments.runs, arguments.split)
    print_table(format_comparison(report))
    if arguments.out is not None:
        write_comparison(report, arguments.out)
        logger.info("written to %s", arguments.out)


def _export_tables(arguments: Namespace) -> None:
    """Run `recsys export-tables`."""
    from recsys.checkpoint.table_export import export_tables

    if not (arguments.run / "metrics.json").is_file():
        raise ValueError(f"{arguments.run}: holds no finished run (metrics.json); train it first")
    counts = export_tables(arguments.run / "checkpoints" / "best", arguments.out, arguments.table)
    for name, rows in counts.items():
        logger.info("table %s: %s rows", name, f"{rows:,}")
    logger.info("written to %s", arguments.out)


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
    """Hide deprecations inside torch and TorchRec, which users of this program cannot fix."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    os.environ.setdefault(
        "HF_HUB_DISABLE_PROGRESS_BARS", "1"
    )  # shown on every rank while loading weights


def main(words: list[str] | None = None) -> int:
    """Run one command; a user's error is one line and exit code 1."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["doctor"]:  # must work where nothing else can be imported
        return doctor.main()
    _silence_advice_to_library_developers()
    try:
        doctor.require_working_installation()
        return _run(words)
    except (ValueError, OSError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # One write, so that the lines of several ranks do not mix.
        sys.stderr.write(f"{rank}error: {error}\n")
        return 1


def _run(words: list[str]) -> int:
    """Parse the words and run the command."""
    from recsys.cli_arguments import command_parser
    from recsys.distributed.lockstep import TrainingStopped
    from recsys.distributed.log import configure_logging

    parser = command_parser(words)
    if not words:
        parser.print_help()
        return 2
    arguments = parser.instantiate(parser.parse_args(words))
    chosen = arguments[arguments.subcommand]
    configure_logging(
        int(os.environ.get("RANK", "0")),
        chosen.get("log_level", "auto"),
        chosen.get("log_format", "text"),
    )
    try:
        COMMANDS[arguments.subcommand](chosen)
    except TrainingStopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
