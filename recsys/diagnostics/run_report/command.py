"""Run `recsys report`: score the test split and write one page on a finished run."""

import logging
from pathlib import Path
from typing import Any

from recsys.build import Job
from recsys.checkpoint.files import BEST, read_manifest
from recsys.checkpoint.partitions import ContinualFolder
from recsys.checkpoint.run_folder import check_metrics, read_item_counts
from recsys.checkpoint.run_schema import PARTITION
from recsys.config.ranking import softmax_settings
from recsys.data.item_frequency import SUBSETS
from recsys.diagnostics.run_report.page import Section, html_page, metrics_table
from recsys.diagnostics.run_report.projector import (
    category_column,
    check_folder,
    item_files,
    item_table,
    write_projector,
)
from recsys.diagnostics.run_report.quality import item_popularity, learning_curves, prequential
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.distributed.watchdog import Watchdog
from recsys.evaluation.evaluate import (
    score,
    scores_report,
    split_interactions,
    usable_scores,
)
from recsys.evaluation.metrics import MIN_USERS
from recsys.evaluation.predict import data_of, load_run
from recsys.evaluation.scores import SplitScores, read_scores
from recsys.storage.files import atomic_write, read_json
from recsys.storage.location import Location
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

SPLIT = "test"
PROBABILITIES = {"logloss": "log loss", "ne": "normalised entropy", "calibration": "calibration"}


def report_run(
    run: Path, data: str | None, out: Path, ranks: Ranks, device: str, colour_by: str | None
) -> None:
    """Write the page of a run to `out`, and a folder for TensorBoard's projector. A collective.

    That folder is beside the page, such as `report_projector`. `colour_by` names an item column of
    texts or integers.
    """
    with ranks.raise_on_all_ranks():
        check_output(out)
        projector = out.with_name(f"{out.stem}_projector")
        check_folder(projector)
        category = category_column(item_files(Location.of(data_of(run, data))), colour_by)
    job = load_run(run, data, ranks, device)
    with ranks.raise_on_all_ranks():
        table = item_table(job)
        settings = _settings(run)
    is_partition = (run / PARTITION).is_file()
    has_probabilities = softmax_settings(job.config.ranking) is None
    split, scores = _of_partition(run) if is_partition else (SPLIT, _scores(job, run))
    tracked_run = run.parents[1] if is_partition else run
    num_items = write_projector(projector, job, run, table, category)
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            if is_partition:
                metrics = prequential(run.parents[1], has_probabilities)
            else:
                assert scores is not None, "only partitions may have none"
                metrics = summary({SPLIT: scores_report(scores, {})}, has_probabilities)
            best_step = read_manifest(run / "checkpoints" / BEST)["step"]
            sections = [metrics, learning_curves(tracked_run, job.config.best_model_by, best_step)]
            if scores is not None:
                sections.append(item_popularity(scores.counted(0), split, has_probabilities))
            sections += [_item_vectors(projector, num_items), settings]
            atomic_write(out, html_page(f"Run {tracked_run.resolve().name}", sections))
            logger.info("report written to %s", out)


def _of_partition(run: Path) -> tuple[str, SplitScores | None]:
    """Return a partition's name and the scores of its rows; None for the first partition."""
    name = read_json(run / PARTITION)["name"]
    file = ContinualFolder(run.parents[1]).scores_of(name)
    return name, read_scores(file) if file.exists() else None


def _scores(job: Job, run: Path) -> SplitScores | None:
    """Return the scored test rows on rank 0, else None. A collective."""
    interactions = split_interactions(job, SPLIT)
    with Watchdog(job.ranks, job.config.stall_timeout) as watchdog:
        lockstep = Lockstep(job.ranks, job.config.checkpoint.every_seconds, watchdog)
        scored = score(job, interactions, lockstep)
    counts = read_item_counts(run, job.schema.item_id_limit)
    return usable_scores(job, SPLIT, interactions.rows, scored, counts)


def _item_vectors(folder: Path, num_items: int) -> Section:
    if not num_items:
        return Section("Item vectors", ["No item has training impressions and content."])
    paragraphs = [
        f"The vectors of the {num_items:,} items seen most in training are in the projector of "
        "TensorBoard: maps and nearest items, coloured by category or impressions. Choose "
        "Projector in the menu, and there ID, content, or their vectors after the maps of the "
        "contrastive loss (CIC)."
    ]
    return Section("Item vectors", paragraphs, text=f"tensorboard --logdir {folder}")


def summary(metrics: dict[str, Any], has_probabilities: bool) -> Section:
    """Return the section with the test metrics, a table per label, and findings."""
    test = metrics[SPLIT]
    tables = []
    for label, report in test.get("labels", {"items": test}).items():
        names = {"auc": "AUC", "gauc": "GAUC"} | (PROBABILITIES if has_probabilities else {})
        if "auc" not in report:
            names = {name: name.upper() for name in ("rmse", "mae", "nrmse")}
        tables.append(metrics_table(label, names, _by_subset(report)))
    undefined = {} if has_probabilities else dict.fromkeys(PROBABILITIES)
    defined = {subset: values | undefined for subset, values in _by_subset(test).items()}
    verdicts = findings(defined) if "auc" in test else _compared_with_mean("RMSE", test["nrmse"])
    return Section("Test metrics", tables=tables, verdicts=verdicts)


def _compared_with_mean(name: str, ratio: float | None) -> list[str]:
    if ratio is None:
        return []
    gain = 100 * (1 - ratio)
    order = "better" if gain > 0 else "worse"
    return [f"{name} is {order} by {abs(gain):.1f} % than that of always predicting the mean."]


def _by_subset(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {subset: report if subset == "all" else report[subset] for subset in SUBSETS}


def findings(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Return sentences on the test metrics of all, warm and unseen items."""
    every, warm, unseen = metrics["all"], metrics["warm"], metrics["unseen"]
    sentences = _compared_with_mean("Log loss", every["ne"])
    if warm["gauc"] is not None and unseen["gauc"] is not None:
        num_users = min(subset.get("gauc_users", MIN_USERS) for subset in (warm, unseen))
        few = f" One of them rests on {num_users} users alone." * (num_users < MIN_USERS)
        sentences.append(
            f"Within a user, items never seen in training are ranked with a GAUC of "
            f"{unseen['gauc']:.4f}, items seen often with {warm['gauc']:.4f}: a difference of "
            f"{warm['gauc'] - unseen['gauc']:+.4f}. Chance is 0.5.{few}"
        )
    if every["calibration"] is not None and abs(every["calibration"] - 1) > 0.1:
        way = "high" if every["calibration"] > 1 else "low"
        sentences.append(
            f"Predicted probabilities are too {way}: their mean is {every['calibration']:.2f} "
            "times the share of positives."
        )
    return sentences


def _settings(run: Path) -> Section:
    file = run / "metrics.json"
    metrics = read_json(file)
    check_metrics(run)
    try:
        train = metrics["train"]
        versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
        paragraph = (
            f"Trained for {train['steps']:,} steps in {train['seconds']:,.0f} s on "
            f"{metrics['world_size']} rank(s), {train['samples_per_second']:,.0f} samples/s, with "
            f"{versions}."
        )
        return Section("Configuration", [paragraph], text=(run / "config.yaml").read_text())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: not as `recsys train` writes it ({error!r}); bring it back, or train on"
        ) from error
