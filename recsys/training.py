"""Training: the loop, early stopping on validation AUC, and what a run leaves behind.

A run's folder holds `config.yaml` (resolved), `plan.txt`, `checkpoints/best`, TensorBoard events
and, written last, `metrics.json`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward
from torchrec.distributed.types import ShardedModule
from tqdm import tqdm

from recsys.batch import Batch
from recsys.build import Job, build_job, content_settings
from recsys.checkpoint import BEST, load_best, save_best
from recsys.config import Config, save_config
from recsys.content.projection_start import start_projections
from recsys.data.interactions import Interactions, loader
from recsys.data.parquet_rows import ParquetRows
from recsys.evaluation import check_rows, count_training_items, evaluate_split, fill_bank, together
from recsys.metrics import format_report
from recsys.ranks import Ranks

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers", "peft", "torchx")


@dataclass
class Progress:
    """What the loop counts."""

    steps: int = 0
    samples: int = 0  # over all ranks
    seconds: float = 0.0  # in training steps, validation left out
    best_auc: float = -1.0
    best: dict[str, Any] = field(default_factory=dict)
    validations_without_gain: int = 0


class Reporter:
    """Progress bar on a terminal, plain lines elsewhere, TensorBoard beside; rank 0 only."""

    def __init__(self, job: Job, run: Path, num_batches: int) -> None:
        self.active = job.ranks.is_first
        self.every = job.config.log_every_steps
        self.terminal = sys.stderr.isatty()
        self.writer = SummaryWriter(str(run / "tensorboard")) if self.active else None
        self.bar = tqdm(total=num_batches, disable=not (self.active and self.terminal))
        self.num_batches = num_batches

    def say(self, text: str) -> None:
        if self.active:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, epoch: int, progress: Progress, losses: dict[str, torch.Tensor]) -> None:
        self.bar.update()
        if not self.active or progress.steps % self.every:
            return
        rate = progress.samples / progress.seconds
        values = {name: float(value) for name, value in losses.items()}
        text = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.bar.set_postfix_str(f"{text} {rate:,.0f} samples/s")
        if not self.terminal:
            place = (progress.steps - 1) % self.num_batches + 1
            self.say(
                f"epoch {epoch + 1} step {place}/{self.num_batches} {text} {rate:,.0f} samples/s"
            )
        assert self.writer is not None
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, progress.steps)
        self.writer.add_scalar("train/samples_per_second", rate, progress.steps)

    def validation(self, progress: Progress, report: dict[str, Any]) -> None:
        self.say(f"validation after step {progress.steps}\n{format_report(report)}")
        if self.writer is not None:
            for name in ("auc", "gauc", "logloss", "ne"):
                if report[name] is not None:
                    self.writer.add_scalar(f"valid/{name}", report[name], progress.steps)

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def refuse_existing_run(run: Path, ranks: Ranks) -> None:
    """Before the work begins: a trained model is not overwritten unasked. A collective.

    Raises:
        ValueError: the folder holds a model; what an attempt that failed early left does not count.
    """
    with ranks.all_or_none():
        if ranks.is_first and (
            (run / "metrics.json").exists() or (run / "checkpoints" / BEST).exists()
        ):
            raise ValueError(
                f"{run}: holds a run already; choose another --out or pass --overwrite true"
            )


def prepare_run(run: Path, config: Config, ranks: Ranks) -> None:
    """Makes the run's folder, empty of an earlier run, and writes `config.yaml`. A collective."""
    with ranks.all_or_none():
        if ranks.is_first:
            for part in ("checkpoints", "tensorboard"):
                shutil.rmtree(run / part, ignore_errors=True)
            (run / "metrics.json").unlink(missing_ok=True)
            run.mkdir(parents=True, exist_ok=True)
            save_config(config, run / "config.yaml")


def train(
    config: Config, data: str, run: Path, ranks: Ranks, overwrite: bool = False
) -> dict[str, Any]:
    """Trains, keeps the best model, and returns what `metrics.json` holds. A collective.

    Raises:
        ValueError: on every rank, when data, configuration or plan are wanting.
    """
    if not overwrite:
        refuse_existing_run(run, ranks)
    job = build_job(config, data, ranks)
    with ranks.all_or_none():
        rows = ParquetRows.of_split(job.root, "train", job.schema)
        interactions = Interactions(
            rows, job.batch_builder(), config.batch_size, ranks.rank, ranks.world_size, config.seed
        )
        for split in ("valid", "test"):  # else a bad value there would show after the training
            check_rows(job, split)
    item_counts = count_training_items(job)
    prepare_run(run, config, ranks)
    reporter = Reporter(job, run, interactions.num_batches)
    if ranks.is_first:
        (run / "plan.txt").write_text(f"{job.plan}\n\n{job.parameters}\n")
        (run / "data.txt").write_text(f"{data}\n")
    reporter.say(f"{job.plan}\n\n{job.parameters}\n")
    if job.em3.content is not None and job.store is not None:
        start_projections(job.em3.content, job.store, ranks)
        fill_bank(job)
    progress = Progress()
    for epoch in range(config.epochs):
        if not _train_epoch(job, interactions, epoch, progress, reporter, run, item_counts):
            break
    reporter.close()
    load_best(job, run)
    return _finish(job, run, progress, item_counts)


def _train_epoch(
    job: Job,
    interactions: Interactions,
    epoch: int,
    progress: Progress,
    reporter: Reporter,
    run: Path,
    item_counts: np.ndarray,
) -> bool:
    """One epoch with its validations; False when training should end."""
    interactions.epoch = epoch
    batches = together(
        iter(loader(interactions, job.config.num_workers, job.ranks.device.type == "cuda")),
        job.ranks,
    )
    parts = np.diff(
        np.linspace(0, interactions.num_batches, job.config.validations_per_epoch + 1).astype(int)
    )
    for num_batches in parts[parts > 0]:
        _train_steps(job, islice(batches, int(num_batches)), epoch, progress, reporter)
        if not _validate(job, progress, reporter, run, item_counts):
            return False
    return True


def _train_steps(
    job: Job, batches: Iterator[Batch], epoch: int, progress: Progress, reporter: Reporter
) -> None:
    job.model.train()
    start = time.perf_counter()
    before = progress.seconds
    while True:
        try:
            losses, _, batch = cast(Any, job.pipeline.progress(batches))
        except StopIteration:
            break
        if progress.steps == 0:
            require_pipelined(job.model)
        job.schedule.step()
        progress.steps += 1
        progress.samples += batch.batch_size * job.ranks.world_size
        progress.seconds = before + time.perf_counter() - start
        reporter.step(epoch, progress, losses)


def require_pipelined(model: nn.Module) -> None:
    """Checks, after a first step, that the ids of every sharded module are sent ahead of theirs.

    TorchRec only logs a warning where it cannot, and training is then as slow as without pipeline.

    Raises:
        RuntimeError: a sharded module is not pipelined.
    """
    for name, module in model.named_modules():
        if isinstance(module, ShardedModule) and not isinstance(module.forward, BaseForward):
            raise RuntimeError(
                f"sharded module '{name}' is not pipelined: EM3.forward must stay a straight line "
                "and give each collection an attribute of the batch itself"
            )


def _validate(
    job: Job, progress: Progress, reporter: Reporter, run: Path, item_counts: np.ndarray
) -> bool:
    """Validates and keeps the model if it is the best; False when patience has ended."""
    content = content_settings(job.config)
    if content is not None and content.history.refresh_bank_every_epoch:
        fill_bank(job)
    report = evaluate_split(job, "valid", item_counts)
    reporter.validation(progress, report)
    if report["auc"] is None:
        raise ValueError(
            f"{job.root}/valid: all labels are equal, so no AUC can choose the best model; use a "
            "larger validation split"
        )
    if report["auc"] > progress.best_auc:
        progress.best_auc, progress.best = report["auc"], report
        progress.validations_without_gain = 0
        save_best(job, run)
    else:
        progress.validations_without_gain += 1
    return progress.validations_without_gain < job.config.patience


def _finish(job: Job, run: Path, progress: Progress, item_counts: np.ndarray) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "valid": progress.best,
        "test": evaluate_split(job, "test", item_counts),
        "train": {
            "samples_per_second": progress.samples / progress.seconds,
            "seconds": progress.seconds,
            "steps": progress.steps,
        },
        "world_size": job.ranks.world_size,
        "versions": versions(),
    }
    if job.ranks.is_first:
        np.save(run / "item_counts.npy", item_counts)
        partial = run / ".metrics.json"
        partial.write_text(json.dumps(metrics, indent=2) + "\n")
        partial.rename(run / "metrics.json")
        print(f"test\n{format_report(metrics['test'])}\nwritten to {run}", flush=True)
    return metrics
