"""Run the model over batches without training. Shapes: B batch, C labels, N rows."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from recsys.build import Job
from recsys.content.item_vectors import ItemVectorCache
from recsys.data.batch import Batch
from recsys.data.row_source import RowSource
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.log import progress_bar

MAX_MULTIPLE = 4  # largest multiple of a training batch's rows
ENOUGH_ROWS = 2048  # larger batches are not faster


def rows_per_batch(batch_size: int) -> int:
    """Return the number of rows of a scored batch, at least that of a training batch."""
    return max(batch_size, min(MAX_MULTIPLE * batch_size, ENOUGH_ROWS))


def forward_pass(
    job: Job,
    source: Iterator[Batch],
    lockstep: Lockstep,
    unknown: UnknownIds | None = None,
    title: str = "scored batch",
    total: int | None = None,
) -> Iterator[tuple[dict[str, Any], Tensor, Batch]]:
    """Yield (named vectors of the model, logits [B, C], batch) for each batch. A collective.

    Callers disable gradients. Each item is encoded once.
    """
    job.model.eval()
    unknown = unknown or UnknownIds(job.schema)
    source = lockstep.batches(source)
    batches = job.preparation(source, unknown, 0, training=False, with_content=False)
    content, store = job.em3.content, job.store
    if content is not None and store is not None:
        batches = ItemVectorCache(content, store, job.ranks.device)(batches)
    shown = job.ranks.is_first and total is not None
    bar = progress_bar(total or 0, f"{title}es", shown, leave=False)
    with bar, lockstep.watchdog.armed(), job.em3.losses.disabled():
        for number, output in enumerate(job.pipeline.outputs(batches), 1):
            yield output
            bar.update()
            lockstep.watchdog.record_progress(f"{title} {number}")


def require_finite(scored: Mapping[str, Tensor], rows: RowSource) -> None:
    """Raise a ValueError that names the rows (`positions`) whose `logits` are not finite."""
    wrong = ~torch.isfinite(scored["logits"]).all(dim=1)
    if wrong.any():
        raise ValueError(
            f"the logits of {int(wrong.sum()):,} rows are not finite, between "
            f"{rows.describe_range(scored['positions'][wrong].numpy())}; look at the scale of "
            "their dense columns and features"
        )
