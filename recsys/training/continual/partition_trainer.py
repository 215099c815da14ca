"""The training loop of a partition, its settings, and what its run has at the end."""

from __future__ import annotations

import json
from dataclasses import replace

from recsys.checkpoint.new_rows.fill import refill_new_rows
from recsys.checkpoint.partitions.state import RunState
from recsys.checkpoint.run_folder import METRICS, finish_run
from recsys.config import Config, ContinualSettings, content_settings
from recsys.data.filesystem import write_whole
from recsys.evaluation.evaluate import fill_bank
from recsys.training.continual.partitions import Partition
from recsys.training.train import training_figures
from recsys.training.trainer import Trainer


class PartitionTrainer(Trainer):
    """Trains without validation: the next partition's scores tell how good the model is."""

    def _checkpoint_is_due(self, first_step: int, end_of_part: int) -> bool:
        return self._is_due_by_steps(first_step)

    def _validate(self) -> None:
        """At the end of a pass fill rows without training and, if asked, the bank. A collective."""
        content = content_settings(self.job.config)
        if content is not None and content.history.refresh_bank_every_epoch:
            fill_bank(self.job, self.lockstep)
        with self.job.averaged():
            refill_new_rows(self.job, self.run)


def passes_over(settings: ContinualSettings, number: int, from_nothing: bool) -> int:
    """Return the passes over the rows of a partition.

    A model that begins from nothing has made few steps in its first partitions, and gains from
    seeing their rows again, while later passes over rows that it has seen make it fit them too
    closely. A run that begins with another one's model has these steps behind it.

    Args:
        settings: of the continual run.
        number: of the partition among those of the run, from 0.
        from_nothing: the run was begun without another one's model.

    Example::

        passes_over(ContinualSettings(first_passes=[4, 2]), number=1, from_nothing=True)  # 2
    """
    first = settings.first_passes if from_nothing else []
    return first[number] if number < len(first) else settings.passes


def config_of_partition(config: Config, state: RunState) -> Config:
    """Return the settings of the next partition's run; learning rates warm up once."""
    number, from_nothing = len(state.trained), state.warm_start is None
    warmup = config.optimizer.warmup_steps if number == 0 and from_nothing else 0
    return replace(
        config,
        epochs=passes_over(config.continual, number, from_nothing),
        validations_per_epoch=1,
        optimizer=replace(config.optimizer, warmup_steps=warmup),
    )


def finish(trainer: Trainer, partition: Partition) -> None:
    """Keep the model, with averaged weights if there are any, and describe it. A collective."""
    job, progress = trainer.job, trainer.progress
    with job.averaged():
        trainer.checkpoints.save_best(progress)
    metrics = {"partition": partition.name, **training_figures(job, progress)}
    with job.ranks.raise_on_all_ranks():
        if job.ranks.is_first:
            write_whole(trainer.run / METRICS, json.dumps(metrics, indent=2) + "\n")
    finish_run(trainer.run, job.ranks)
