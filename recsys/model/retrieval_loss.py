"""Softmax losses of retrieval: an item against many, corrected for their sampling probability.

In-batch (Yi et al., RecSys 2019): the items of the batch's other rows are the negatives. Sampled
(Jean et al. 2015, arXiv 1412.2007): negatives are drawn from the catalogue. Frequent items are
negatives more often. Subtracting log Q, the log of the probability that an item is drawn, corrects
for it; the scores then estimate how probable an item is, including its popularity. Without the
correction (`ranking.log_q_correction`) they estimate how much more probable an item is for this
user than for all users.

Shapes: B batch, S sampled negatives, K candidates (B or S of this rank, or of all), C labels,
D width of the vectors.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.config import RetrievalSettings
from recsys.data.batch import Batch
from recsys.distributed.gather import gather_rows_with_gradient
from recsys.ranking.vectors import TowerVectors

PADDING = -1  # replaces the item of a padding row


class RetrievalLoss(nn.Module):
    """Sum over labels of weight times the mean over all rows of the positive rows' cross-entropy.

    A row with label 0 has no loss of its own, but its item is a negative for other rows (in-batch).
    A row's own item and padding rows are never negatives.

    Args:
        settings: `loss` (in-batch or sampled softmax) and `all_ranks` are read.
        label_weights: weight of each label.
    """

    weights: Tensor

    def __init__(self, settings: RetrievalSettings, label_weights: list[float]) -> None:
        super().__init__()
        self.in_batch = settings.loss == "in_batch_softmax"
        self.all_ranks = settings.all_ranks
        self.register_buffer("weights", torch.tensor(label_weights), persistent=False)

    def forward(self, towers: TowerVectors, batch: Batch) -> Tensor:  # []
        """Return the loss of a batch with log Q (`recsys.data.negatives` fills it in).

        A collective if `settings.all_ranks` is on.
        """
        of_items = batch.target_items.masked_fill(batch.row_weights == 0, PADDING)
        own_log_q = batch.target_log_q
        assert own_log_q is not None
        if self.in_batch:
            vectors, items, log_q = towers.item, of_items, own_log_q
        else:
            assert towers.negatives is not None and batch.negative_items is not None
            assert batch.negative_log_q is not None
            vectors, items, log_q = towers.negatives, batch.negative_items, batch.negative_log_q
        vectors, items, log_q = self._candidates(vectors, items, log_q)
        is_no_negative = (items == batch.target_items.unsqueeze(1)) | (items == PADDING)  # [B, K]
        own = towers.scores - own_log_q.unsqueeze(1)  # [B, C]
        losses = []
        for query, positive in zip(towers.query.unbind(dim=1), own.unbind(dim=1), strict=True):
            scores = (query @ vectors.T - log_q).masked_fill(is_no_negative, -torch.inf)
            every = torch.cat([positive.unsqueeze(1), scores], dim=1)
            losses.append(every.logsumexp(dim=1) - positive)
        counts = batch.labels.nan_to_num() * batch.loss_weights  # [B, C]
        # The mean is over all rows, so that each positive has the same weight on any rank.
        return ((torch.stack(losses, dim=1) * counts).mean(0) * self.weights).sum()

    def _candidates(
        self,
        vectors: Tensor,  # [B or S, D]
        items: Tensor,  # [B or S]
        log_q: Tensor,  # [B or S]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [K, D], [K], [K]
        """Return vectors, items and log Q of the candidates; a collective if `all_ranks` is on."""
        if not self.all_ranks or not dist.is_initialized() or dist.get_world_size() == 1:
            return vectors, items, log_q
        vectors, _ = gather_rows_with_gradient(vectors.contiguous())
        with torch.no_grad():  # in float64 an id is exact
            both = torch.stack([items.double(), log_q.double()], dim=1)
            both, _ = gather_rows_with_gradient(both)
        return vectors, both[:, 0].to(items.dtype), both[:, 1].to(log_q.dtype)
