"""The slow way to score: every batch of training's size reads and encodes its own items."""

import torch
from torch import Tensor

from recsys.build import Job
from recsys.data.interactions import Interactions
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.lockstep import Lockstep
from recsys.evaluation.evaluate import score, split_interactions


@torch.no_grad()
def logits_slowly(job: Job, split: str) -> tuple[Tensor, Tensor]:
    """Positions [N] and logits [N, C] of this rank's rows; a collective."""
    size, ranks = job.config.batch_size, job.ranks
    build = job.batch_builder()
    rows = Interactions(job.rows(split), build, size, ranks.rank, ranks.world_size)
    job.model.eval()
    batches = Lockstep(ranks).batches(iter(rows))
    prepared = job.preparation(batches, UnknownIds(job.schema), 0, training=False)
    with job.em3.losses.disabled():
        pairs = [
            (batch.rows.positions, logits) for _, logits, batch in job.pipeline.outputs(prepared)
        ]
    positions, logits = (torch.cat(list(column)) for column in zip(*pairs))
    return positions[positions >= 0], logits[positions >= 0]


def assert_scored_alike(job: Job, split: str) -> None:
    """`score` gives the logits of the slow way, up to rounding; a collective."""
    positions, logits = logits_slowly(job, split)
    interactions = split_interactions(job, split)
    assert interactions.batch_size > job.config.batch_size
    scored = score(job, interactions)
    scored = job.ranks.from_first(scored)
    order = scored["positions"].argsort()
    torch.testing.assert_close(scored["logits"][order][positions], logits, rtol=1e-5, atol=1e-6)
