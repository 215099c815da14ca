"""Scores a partition (prequential evaluation), and trains on it in a run of its own.

Metrics come from the file of scores, so a restarted job repeats no row and no line.
"""

import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embeddings.plan_text import align_columns
from recsys.build import Job, build_job
from recsys.checkpoint import run_folder
from recsys.checkpoint.files import folders_by_age, model_of
from recsys.checkpoint.manager import Checkpoints
from recsys.checkpoint.partitions import ContinualFolder, RunState, TrainedPartition
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.run_schema import PARTITION, schema_of_data
from recsys.checkpoint.warm_start.plan import plan_warm_start
from recsys.checkpoint.warm_start.source import Source, WarmStart
from recsys.config import Config, ContinualSettings, RankingSettings, softmax_settings
from recsys.data.interactions import Interactions
from recsys.data.item_frequency import SUBSETS, ItemCounts
from recsys.data.row_source import RowSource, open_rows
from recsys.data.schema import Schema
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks
from recsys.evaluation import evaluate
from recsys.evaluation.blend_fit import fit_blend
from recsys.evaluation.further_metrics import make_metrics
from recsys.evaluation.model_selection import require_useful, slack_for
from recsys.evaluation.scores import SplitScores, read_scores, write_scores
from recsys.storage.files import write_json
from recsys.storage.location import Location
from recsys.training import initial_state
from recsys.training.continual import changes
from recsys.training.continual.partitions import (
    Partition,
    PartitionRange,
    is_late,
    require_files_in_order,
)
from recsys.training.trackers import Reporter
from recsys.training.train import training_interactions, training_metrics
from recsys.training.trainer import Trainer

logger = logging.getLogger(__name__)


class PhaseTimer:
    """Seconds of the phases of a partition, for the log and `RUN/seconds.jsonl`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lap_start = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase: the time since the last call belongs to it."""
        timestamp = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + timestamp - self._lap_start
        self._lap_start = timestamp

    def append(self, file: Path, partition: str, rows: int) -> None:
        total = sum(self.seconds.values())
        line = {"partition": partition, "rows": rows, **self.seconds, "total": total}
        with file.open("a") as opened:
            opened.write(json.dumps(line) + "\n")

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({phases})"


@dataclass(frozen=True)
class ContinualRun:
    """Settings, folders and ranks that the runs of all partitions share."""

    config: Config
    data: str
    folder: ContinualFolder
    ranks: Ranks
    lockstep: Lockstep  # keeps the ranks on the same batch, and receives requests to end
    writers: Ranks  # the same ranks with a group for checkpoints
    span: PartitionRange  # partitions to walk
    follow: bool  # wait for further partitions, until the job is asked to end
    warm_start: WarmStart | None  # the run that the first partition starts from


class PartitionRun:
    """Scores a partition, then trains on it in a run. Holds no job, so that its memory is freed."""

    def __init__(self, continual: ContinualRun, partition: Partition, state: RunState) -> None:
        self.continual, self.partition, self.state = continual, partition, state
        self.folder, self.ranks, self.timer = continual.folder, continual.ranks, PhaseTimer()
        self.run = self.folder.run_of(partition.name)
        number, from_nothing = len(state.trained), state.warm_start is None
        # Learning rates warm up in the first run only.
        warmup = continual.config.optimizer.warmup_steps if number == 0 and from_nothing else 0
        self.config = replace(
            continual.config,
            epochs=num_passes(continual.config.continual, number, from_nothing),
            validations_per_epoch=1,
            optimizer=replace(continual.config.optimizer, warmup_steps=warmup),
        )
        self.previous, self.request = "", continual.warm_start  # partition and run to start from
        if state.last is not None:
            self.previous = state.last.name
            # `last` and `best` have the same weights, unless `best` has averages.
            has_averages = self.config.optimizer.ema_decay is not None
            self.request = WarmStart(
                self.folder.run_of(self.previous), checkpoint="last" if has_averages else "best"
            )

    def train(self) -> TrainedPartition:
        """Score the partition and train on it, or resume its run. A collective."""
        ranks, request = self.ranks, self.request
        with ranks.raise_on_all_ranks():
            if request is not None and not (request.run / "config.yaml").is_file():
                raise ValueError(
                    f"{request.run}: has not the model that {self.partition.folder} goes on from; "
                    "bring it back, or start a new run in another --out"
                )
            if ranks.is_first:
                run_folder.recover_checkpoints(self.run)
        resumes = ranks.from_first(bool(folders_by_age(self.run / "checkpoints")))
        schema, source, ids = self._schema(resumes)
        self.timer.lap("read")
        job = build_job(self.config, self.continual.data, ranks, schema, self.partition.folder)
        self.timer.lap("build")
        trainer = self._open(job, source, ids)
        try:
            self.timer.lap("begin")
            trainer.train()
            self.timer.lap("train")
            self._finish(trainer)
        finally:
            trainer.reporter.close()
            trainer.checkpoints.close()
        self.timer.lap("finish")
        return self._with_fingerprint(trainer.interactions)

    def _schema(self, resumes: bool) -> tuple[Schema, Source | None, changes.NewIds | None]:
        """Return the schema, the run to start from and the partition's new ids; None if resumed.

        New ids get table rows once the partition is scored. A collective.
        """
        data, ranks, root = self.continual.data, self.ranks, Location.of(self.continual.data)
        if resumes:
            with ranks.raise_on_all_ranks():
                return schema_of_data(self.run, root, ranks, resumes), None, None
        source, previous = None, None
        if self.request is not None:
            source, schema = initial_state.open_warm_start(
                self.request, data, self.run, ranks, with_vocabularies=False
            )
            previous = schema, source.schema
            if self.state.last is not None:
                with ranks.raise_on_all_ranks():
                    changes.require_unchanged(source, self.config, root)
        schema, ids = changes.new_schema(root, self.partition, previous, ranks)
        return schema, source, ids

    def _open(self, job: Job, source: Source | None, ids: changes.NewIds | None) -> Trainer:
        """Return the trainer of a new or restored run. A collective."""
        is_shuffled = job.config.continual.order == "shuffled"
        interactions = training_interactions(job, is_shuffled)
        if not is_shuffled:
            require_files_in_order(chunk.place for chunk in interactions.rows.chunks)
        current = self._with_fingerprint(interactions)
        with self.ranks.raise_on_all_ranks():
            self._refuse_other_rows(current, ids is None)
        checkpoints = Checkpoints(job, self.run, current.fingerprint, self.continual.writers)
        if ids is None:
            run_folder.check_encoders(self.run, job)
            progress = checkpoints.restore()
            assert progress is not None  # a checkpoint was seen
        else:
            progress = self._begin(current, job, source, ids)
        line = self.ranks.on_first(self._record)
        item_counts = run_folder.read_item_counts(self.run, job.schema.item_id_limit)
        reporter = Reporter(job, self.folder.path, progress, counts_all_steps=True)
        if line is not None:
            reporter.evaluation("prequential", 0, {**line, "rows": None})
            for subset in SUBSETS[1:]:
                reporter.evaluation(f"prequential/{subset}", 0, line[subset])
        lockstep = self.continual.lockstep
        return PartitionTrainer(
            job, self.run, interactions, checkpoints, lockstep, reporter, progress, item_counts
        )

    def _with_fingerprint(self, interactions: Interactions) -> TrainedPartition:
        rows = interactions.rows
        return TrainedPartition(self.partition.name, rows.num_rows, rows.fingerprint())

    def _refuse_other_rows(self, current: TrainedPartition, resumes: bool) -> None:
        """Refuse rows that have changed since they were scored, and rows trained on before."""
        previous, folder = self.state.begun, self.partition.folder
        are_scored = resumes or self.folder.scores_of(current.name).exists()
        if previous is not None and previous != current and are_scored:
            raise ValueError(
                f"{folder}: has changed since it was scored (then {previous.rows:,} rows, now "
                f"{current.rows:,}; {previous.fingerprint} and {current.fingerprint}); bring it "
                "back, or start a new run in another --out"
            )
        has_digest = "-" in current.fingerprint  # of the content, not of names and sizes alone
        for trained in self.state.trained:
            if has_digest and trained.fingerprint == current.fingerprint:
                raise ValueError(
                    f"{folder}: has the {current.rows:,} rows of {trained.name}, which is trained "
                    "on; rename it back, or remove the copy"
                )

    def _begin(
        self, current: TrainedPartition, job: Job, source: Source | None, ids: changes.NewIds
    ) -> Progress:
        """Begin the run; first score its rows if there is an earlier model. A collective."""
        run, ranks, plan, counts = self.run, self.ranks, None, ItemCounts.sum_of([])
        begun_state = replace(self.state, begun=current)
        if source is not None:
            plan = plan_warm_start(job, source)
            plan.take_unused_rows(job)
            changes.check_items(job, plan)
            progress = initial_state.load_source(job, plan)
            counts = initial_state.counts_before(job, plan)
            self.timer.lap("warm start")
            if is_late(current.name, self.state):
                logger.info("%s: late, so it is trained on without scores", current.name)
            else:
                self._write_scores(begun_state, job, counts, source.request.run)
            self.timer.lap("score")
        changes.add_ids(job.schema, ids, ranks)
        checked = evaluate.check_data(job, ("train",))
        if plan is None:
            progress = initial_state.start_fresh(job, checked)
        else:
            partitions = [Partition(trained.name) for trained in self.state.trained]
            partitions.sort(key=lambda partition: partition.key)  # a late one is not the latest
            folders = [partition.folder for partition in partitions]
            initial_state.fit_to_rows(job, plan, checked.numbers, folders)
        self.timer.lap("fit")
        ranks.on_first(self.folder.write, begun_state)
        # Dropout and negatives differ by partition, and are the same at every start.
        torch.manual_seed(job.config.seed + 1 + ranks.rank + 1000003 * progress.age)
        counts = ItemCounts.sum_of([counts, checked.item_counts])
        run_folder.begin_run(run, job, counts, checked.skipped)
        ranks.on_first(run_folder.describe_run, run, job, self.continual.data)
        if plan is not None:
            ranks.on_first(initial_state.describe_start, run, plan)
        ranks.on_first(write_json, run / PARTITION, {"name": current.name})
        return progress

    def _write_scores(
        self, begun_state: RunState, job: Job, counts: ItemCounts, previous_run: Path
    ) -> None:
        """Score the partition by the previous run, unless scores exist. A collective."""
        file, model = self.folder.scores_of(self.partition.name), model_of(previous_run)
        are_written = self.ranks.from_first(file.exists())
        if are_written and job.em3.neighbours is None:  # otherwise the blend is fitted again
            return
        with job.averaged():
            scores = score_partition(job, counts, self.continual.lockstep)
        with self.ranks.raise_on_all_ranks():
            if scores is not None and not are_written:
                # Written before the scores, so that these are known to be of `begun_state`'s rows.
                self.folder.write(begun_state)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_scores(scores, file, model)

    def _record(self) -> dict[str, Any] | None:
        """Write and print the partition's metrics, once, and return them. On rank 0."""
        name, file = self.partition.name, self.folder.scores_of(self.partition.name)
        if not file.exists():
            return None
        scores = read_scores(file)
        line = {"partition": name, "model_of": self.previous, "rows": len(scores.positions)}
        line |= evaluate.scores_report(scores, make_metrics(self.config.metrics))
        if not self.folder.add_metrics(line):
            return None
        print_table(format_lines(self.config.ranking, [line]))
        return line

    def _finish(self, trainer: Trainer) -> None:
        """Save the model, with averaged weights if there are any, and metrics. A collective."""
        job, progress = trainer.job, trainer.progress
        with job.averaged():
            trainer.checkpoints.save_best(progress)
        metrics = {"partition": self.partition.name, **training_metrics(progress, self.ranks)}
        self.ranks.on_first(write_json, self.run / run_folder.METRICS, metrics, 2)
        self.ranks.on_first(run_folder.finish_run, self.run)

    def require_useful_scores(self) -> None:
        """Refuse to go on from the partition if its scores were useless. On rank 0."""
        lines = [line for line in self.folder.metrics() if line["partition"] == self.partition.name]
        if not lines or softmax_settings(self.config.ranking) is not None:
            return

        def rows() -> RowSource:
            root, folder = Location.of(self.continual.data), self.partition.folder
            schema = schema_of_data(self.run, root, self.ranks)
            return open_rows(self.config.source, root, folder, schema, self.config.on_bad_row)

        model = lines[0]["model_of"] or "the run that it was begun from"
        subject = f"{self.continual.data}/{self.partition.folder}, scored by the model of {model}"
        consequence = (
            "Its scores are kept, and it is trained on; the same command goes on with the next one"
        )
        require_useful(lines[0], subject, rows, consequence, slack=slack_for(lines[0]["rows"]))


class PartitionTrainer(Trainer):
    """Trains without validation: the next partition's scores tell how good the model is."""

    saves_before_validation = False

    def _validate(self) -> None:
        """At the end of a pass fill rows without training and, if asked, the bank. A collective."""
        with self.job.averaged():  # these weights score the next partition
            self._refresh_bank()
            initial_state.refill_cold_rows(self.job)


def num_passes(settings: ContinualSettings, number: int, from_nothing: bool) -> int:
    """Return the number of passes; a model `from_nothing` gains from several at first."""
    first = settings.first_passes if from_nothing else []
    return first[number] if number < len(first) else settings.passes


def score_partition(job: Job, item_counts: ItemCounts, lockstep: Lockstep) -> SplitScores | None:
    """Return the scores of the job's training rows on rank 0, else None. A collective.

    Then the blend of neighbours is fitted to these rows, which the model was not trained on.
    """
    ranks = job.ranks
    interactions, unknown = evaluate.split_interactions(job, "train"), UnknownIds(job.schema)
    scored = evaluate.score(job, interactions, lockstep, unknown, with_evidence=True)
    rows, folder = interactions.rows, job.train_folder
    if job.config.on_bad_row == "skip":
        rows.skipped(ranks, folder)
    scores = evaluate.usable_scores(job, folder, rows, scored, item_counts)
    fit_blend(job, dict(scored))
    if (line := format_unknown(folder, unknown.totals(ranks.group))) is not None:
        logger.info(line)
    return scores


def format_lines(ranking: RankingSettings, lines: list[dict[str, Any]]) -> str:
    """Return lines of `metrics.jsonl` as a table."""
    if not lines:
        return ""
    names = [name for name in evaluate.shown_metrics(ranking, lines[-1]) if name in lines[-1]]
    columns = [f"{kind} {names[0] if len(names) < 2 else names[1]}" for kind in ("cold", "unseen")]
    rows = [["partition", "rows", *names, *columns]]
    for line in lines:
        values = [line.get(name) for name in names]
        values += [line[kind.split()[0]].get(kind.split()[1]) for kind in columns]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        rows.append([line["partition"], f"{line['rows']:,}", *cells])
    return align_columns(rows)
