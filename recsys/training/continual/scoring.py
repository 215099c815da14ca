"""Scores a partition before it is trained on, and records the metrics (prequential evaluation).

Metrics come from the file of scores, so a killed job repeats no row and no line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from embeddings.plan_text import align_columns
from recsys.build import Job
from recsys.checkpoint.partitions import ContinualFolder
from recsys.checkpoint.run_schema import schema_of_data
from recsys.config import Config, MetricSettings, RankingSettings, softmax_settings
from recsys.data.item_frequency import PARTS, ItemCounts
from recsys.data.row_source import RowSource, open_rows
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.evaluation.blend_fit import fit_blend
from recsys.evaluation.evaluate import (
    score,
    scores_report,
    shown_metrics,
    split_interactions,
    split_scores,
)
from recsys.evaluation.forward_pass import require_finite
from recsys.evaluation.further_metrics import make_metrics
from recsys.evaluation.model_selection import require_useful, slack_for
from recsys.evaluation.scores import SplitScores, read_scores
from recsys.storage.location import Location
from recsys.training.continual.partitions import Partition
from recsys.training.trackers import Reporter

logger = logging.getLogger(__name__)


def score_partition(job: Job, item_counts: ItemCounts, lockstep: Lockstep) -> SplitScores | None:
    """Return the scores of the job's training rows on rank 0, else None. A collective.

    Then the blend of neighbours is fitted to these rows, which the model was not trained on.
    """
    ranks = job.ranks
    interactions, unknown = split_interactions(job, "train"), UnknownIds(job.schema)
    scored = score(job, interactions, lockstep, unknown, with_evidence=True)
    if job.config.on_bad_row == "skip":
        interactions.rows.skipped(ranks, job.train_folder)
    scores = None
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            require_finite(scored, interactions.rows)
            scores = split_scores(job.schema, scored, item_counts)
    fit_blend(job, dict(scored))
    if (line := format_unknown(job.train_folder, unknown.totals(ranks.group))) is not None:
        logger.info(line)
    return scores


def record_metrics(
    metrics: Mapping[str, MetricSettings],
    folder: ContinualFolder,
    partition: Partition,
    model_name: str,
) -> dict[str, Any] | None:
    """Add the partition's line to `metrics.jsonl`; return it, None if it was there. On rank 0."""
    scores = read_scores(folder.scores_of(partition.name))
    line = {"partition": partition.name, "model_of": model_name, "rows": len(scores.positions)}
    line |= scores_report(scores, make_metrics(metrics))
    return line if folder.add_metrics(line) else None


def require_useful_scores(
    config: Config, data: str, folder: ContinualFolder, partition: Partition, ranks: Ranks
) -> None:
    """Refuse to go on from a partition whose scores were useless. On rank 0."""
    lines = [line for line in folder.metrics() if line["partition"] == partition.name]
    if not lines or softmax_settings(config.ranking) is not None:
        return
    line = lines[0]

    def rows() -> RowSource:
        root = Location.of(data)
        schema = schema_of_data(folder.run_of(partition.name), root, ranks)
        return open_rows(config.source, root, partition.folder, schema, config.on_bad_row)

    model = line["model_of"] or "the run that it was begun from"
    require_useful(
        line,
        f"{data}/{partition.folder}, scored by the model of {model}",
        rows,
        "Its scores are kept, and it is trained on; the same command goes on with the next one",
        slack=slack_for(line["rows"]),
    )


def track(reporter: Reporter, line: dict[str, Any]) -> None:
    """Pass a partition's metrics to the trackers: of all items, and of each part of them."""
    reporter.evaluation("prequential", 0, {**line, "rows": None})
    for part in PARTS[1:]:
        reporter.evaluation(f"prequential/{part}", 0, line[part])


def format_lines(ranking: RankingSettings, lines: list[dict[str, Any]]) -> str:
    """Return lines of `metrics.jsonl` as a table."""
    if not lines:
        return ""
    names = [name for name in shown_metrics(ranking, lines[-1]) if name in lines[-1]]
    parts = [f"{part} {names[0] if len(names) < 2 else names[1]}" for part in ("cold", "unseen")]
    rows = [["partition", "rows", *names, *parts]]
    for line in lines:
        values = [line.get(name) for name in names]
        values += [line[part.split()[0]].get(part.split()[1]) for part in parts]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        rows.append([line["partition"], f"{line['rows']:,}", *cells])
    return align_columns(rows)
