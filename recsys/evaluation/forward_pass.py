"""Runs the model over batches without training, for scoring, retrieval and the dry run.

Shapes: B batch, C labels, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from recsys.build import Job
from recsys.data.batch import Batch
from recsys.data.row_source import RowSource
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import progress_bar


def forward_pass(
    job: Job,
    source: Iterator[Batch],
    lockstep: Lockstep,
    unknown: UnknownIds | None = None,
    place: str = "scored batch",
    total: int | None = None,
) -> Iterator[tuple[dict[str, Any], Tensor, Batch]]:
    """Yield (losses and vectors by name, logits [B, C], batch) of each batch. A collective.

    Args:
        job: the job; its model is put into evaluation mode. Callers disable gradients themselves.
        source: batches of this rank, as many as on every other rank.
        lockstep: keeps the ranks on the same batch.
        unknown: counts ids that have no row of their own.
        place: what the watchdog calls a batch in its messages.
        total: number of batches, for a progress bar; None: no bar.

    Raises:
        TrainingStopped: `lockstep` reports that the job is to end.
    """
    job.model.eval()
    batches = job.preparation(
        lockstep.batches(source), unknown or UnknownIds(job.schema), first_step=0, training=False
    )
    shown = job.ranks.is_first and total is not None
    bar = progress_bar(total or 0, f"{place}es", shown, leave=False)
    with bar, lockstep.watchdog.armed():
        for number, output in enumerate(job.pipeline.outputs(batches), 1):
            yield output
            bar.update()
            lockstep.watchdog.mark(f"{place} {number}")


def require_finite(
    scored: dict[str, Tensor],  # `positions` [N], `logits` [N, C]
    rows: RowSource,
) -> None:
    """Raise a ValueError that names the rows whose logits are not finite."""
    bad = ~torch.isfinite(scored["logits"]).all(dim=1)
    if bad.any():
        raise ValueError(
            f"the logits of {int(bad.sum()):,} rows are not finite, between "
            f"{rows.describe_range(scored['positions'][bad].numpy())}; look at the scale of their "
            "dense columns and features"
        )
