"""Progress of a run: all counters of its training loop, in a form that a checkpoint can store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recsys.data.row_source import Stage

if TYPE_CHECKING:  # manifests are read without torch
    from recsys.build import Job
    from recsys.data.vocabularies import UnknownIds


@dataclass
class Progress:
    """Counters of the training loop."""

    steps: int = 0  # batches: updates of the ID tables
    dense_steps: int = 0  # updates of all other parameters, fewer if gradients are accumulated
    samples: int = 0  # over all ranks
    seconds: float = 0.0  # in training steps, validation excluded
    peak_bytes: int = 0  # the most memory of this rank's GPU or process
    # Steps of the runs that a warm start took over, which count for the ages of bank vectors.
    steps_before: int = 0
    table_steps_before: int = 0
    # Position in the data: epoch, parts read by other numbers of ranks, batches of each rank since.
    epoch: int = 0
    stages: list[Stage] = field(default_factory=list)
    batches: int = 0
    validations: int = 0  # in this epoch
    best_step: int = -1
    best_score: float = -1.0  # by the metric `best_model_by`
    best: dict[str, Any] = field(default_factory=dict)
    validations_without_gain: int = 0
    # Looked-up and unknown ids by column; ids that got and lost a row by bounded vocabulary.
    ids: dict[str, dict[str, int]] = field(default_factory=dict)
    vocabularies: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def age(self) -> int:
        """Number of steps, with those of all runs from which this one was warm-started."""
        return self.steps_before + self.steps

    @property
    def table_steps(self) -> int:
        """Number of steps that the state of the fused optimizers has seen."""
        return self.table_steps_before + self.steps

    def begin_next_epoch(self) -> None:
        self.epoch += 1
        self.stages, self.batches, self.validations = [], 0, 0

    def count_ids(self, job: Job, unknown: UnknownIds) -> None:
        """Add the counts of raw ids since the last call. A collective."""
        _add(self.ids, unknown.totals(job.ranks.group))
        for table, counts in job.vocabularies.counts().items():
            changes = {"admitted": counts.admitted, "evicted": counts.evicted}
            _add(self.vocabularies, {table: changes})

    @staticmethod
    def from_json(values: dict[str, Any]) -> Progress:
        return Progress(**{**values, "stages": [Stage(**stage) for stage in values["stages"]]})


def _add(totals: dict[str, dict[str, int]], counts_by_name: dict[str, dict[str, int]]) -> None:
    for name, counts in counts_by_name.items():
        total = totals.setdefault(name, {})
        for key, count in counts.items():
            total[key] = total.get(key, 0) + count
