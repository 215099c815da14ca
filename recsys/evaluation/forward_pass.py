"""Runs the model over batches without training, for scoring, retrieval and the dry run.

Shapes: B batch, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from recsys.build import Job
from recsys.data.batch import Batch
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.lockstep import Lockstep


def forward_pass(
    job: Job,
    source: Iterator[Batch],
    lockstep: Lockstep,
    unknown: UnknownIds | None = None,
    place: str = "scored batch",
) -> Iterator[tuple[dict[str, Any], Tensor, Batch]]:
    """Yield (losses and vectors by name, logits [B, C], batch) of each batch. A collective.

    Args:
        job: the job; its model is put into evaluation mode. Callers disable gradients themselves.
        source: batches of this rank, as many as on every other rank.
        lockstep: keeps the ranks on the same batch.
        unknown: counts ids that have no row of their own.
        place: what the watchdog calls a batch in its messages.

    Raises:
        TrainingStopped: `lockstep` reports that the job is to end.
    """
    job.model.eval()
    batches = job.preparation(
        lockstep.batches(source), unknown or UnknownIds(job.schema), first_step=0, training=False
    )
    with lockstep.watchdog.armed():
        for number, output in enumerate(job.pipeline.outputs(batches), 1):
            yield output
            lockstep.watchdog.mark(f"{place} {number}")
