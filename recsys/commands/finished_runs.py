"""Commands on finished runs: evaluate, predict, report, compare and export-tables."""

import logging
from pathlib import Path
from typing import Literal

from recsys.commands.options import require_finished
from recsys.doctor import require_working_installation
from recsys.extras import require_extra

logger = logging.getLogger(__name__)
Device = Literal["auto", "cpu", "cuda"]


def evaluate(
    run: Path, data: str | None = None, device: Device = "auto", split: str = "test"
) -> None:
    """Compute the metrics of a run on a split. A collective.

    Args:
        run: folder of a finished run
        data: dataset; default: the run's own
        device: auto, cpu or cuda
        split: train, valid or test
    """
    run = require_finished(run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.evaluation.predict import evaluate as evaluate_run

    with joined_ranks(device) as ranks:
        evaluate_run(run, data, split, ranks, device)


def predict(
    run: Path, input: list[str], out: Path, data: str | None = None, device: Device = "auto"
) -> None:
    """Write impressions with the predictions of a run. A collective.

    Args:
        run: folder of a finished run
        input: Parquet files of impressions, or folders of them
        out: Parquet file to write
        data: dataset; default: the run's own
        device: auto, cpu or cuda
    """
    run = require_finished(run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.evaluation.predict import predict as predict_rows

    with joined_ranks(device) as ranks:
        predict_rows(run, input, out, data, ranks, device)


def report(
    run: Path,
    data: str | None = None,
    device: Device = "auto",
    out: Path | None = None,
    colour_by: str | None = None,
) -> None:
    """Write an HTML page on a run. A collective.

    Args:
        run: folder of a finished run
        data: dataset; default: the run's own
        device: auto, cpu or cuda
        out: file; default: RUN/report.html
        colour_by: column of the items' files to colour them by; default: genres or category
    """
    out = out or run / "report.html"
    run = require_finished(run)
    require_working_installation()
    require_extra("plots", "recsys report", "matplotlib")
    from recsys.diagnostics.run_report.command import report_run
    from recsys.distributed.ranks import joined_ranks

    with joined_ranks(device) as ranks:
        report_run(run, data, out, ranks, device, colour_by)


def compare(runs: list[Path], split: str = "test", out: Path | None = None) -> None:
    """Print the metrics of runs, and which differences are significant.

    Args:
        runs: finished runs; the others are compared to the first
        split: train, valid or test
        out: JSON file to write the numbers to
    """
    from recsys.checkpoint.partitions import newest_run
    from recsys.distributed.log import print_table
    from recsys.evaluation.compare import compare_runs, format_comparison
    from recsys.storage.files import write_json
    from recsys.storage.output_file import check_output

    if out is not None:
        check_output(out)
    comparison = compare_runs([newest_run(run) for run in runs], split)
    print_table(format_comparison(comparison))
    if out is not None:
        write_json(out, comparison, indent=2)
        logger.info("written to %s", out)


def export_tables(run: Path, out: Path, table: list[str] | None = None) -> None:
    """Write the ID tables of a run to one Parquet file.

    Args:
        run: folder of a finished run
        out: Parquet file to write
        table: tables by name; default: all
    """
    run = require_finished(run)
    require_working_installation()
    from recsys.checkpoint.compatibility import check_config
    from recsys.checkpoint.files import BEST, check_files, read_manifest
    from recsys.checkpoint.reader import export_tables as write_tables
    from recsys.checkpoint.reader import require_model_alone
    from recsys.config import load_config
    from recsys.storage.files import recover_folder

    best = run / "checkpoints" / BEST
    recover_folder(best)
    manifest = read_manifest(best)
    check_files(best, manifest)
    require_model_alone(best)
    check_config(manifest["config"], load_config(run / "config.yaml"), str(best))
    for name, rows in write_tables(best, out, table).items():
        logger.info("table %s: %s rows", name, f"{rows:,}")
    logger.info("written to %s", out)
