"""Losses: of labels for ranking, Content-ID-Contrastive (CIC), and the softmax losses of retrieval.

CIC (EM3, arXiv 2404.06078) pulls an item's content vector and its ID vector together. In-batch
softmax: Yi et al., RecSys 2019. Sampled softmax: Jean et al. 2015, arXiv 1412.2007. Subtracting log
Q, the log of the probability that an item is drawn, corrects for drawing frequent items more often.
Shapes: B batch, G batch of all ranks, D dimension, C labels, E members of an ensemble, S sampled
negatives, K negatives or candidates (B or S of this rank, or of all).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ContrastiveSettings, RetrievalSettings
from recsys.data.batch import Batch
from recsys.distributed.gather import gather_rows_with_gradient
from recsys.ranking.vectors import CodeLogits, TowerVectors

# Logits and labels of the same shape -> losses of that shape.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": partial(F.binary_cross_entropy_with_logits, reduction="none"),
    "mse": partial(F.mse_loss, reduction="none"),
    "huber": partial(F.huber_loss, reduction="none"),
    "poisson": partial(F.poisson_nll_loss, log_input=True, reduction="none"),
}


def label_losses(logits: Tensor, labels: Tensor, losses: Sequence[str]) -> Tensor:  # [..., C]
    """Return the loss of each row and label."""
    if set(losses) == {"bce"}:
        return LOSSES["bce"](logits, labels)
    columns_by_loss = zip(losses, logits.unbind(-1), labels.unbind(-1), strict=True)
    return torch.stack([LOSSES[loss](*columns) for loss, *columns in columns_by_loss], dim=-1)


def predictions(logits: Tensor, losses: Sequence[str]) -> Tensor:  # [B, C], [C] -> [B, C]
    """Return the prediction of each label: a probability (bce), a number, or an expected count."""
    activations = {"bce": torch.sigmoid, "poisson": torch.exp}
    columns = zip(losses, logits.unbind(1), strict=True)
    predicted = [activations.get(loss, torch.clone)(column) for loss, column in columns]
    return torch.stack(predicted, dim=1)


class RankingLoss(nn.Module):
    """Sum over labels of weight times the mean loss: by default binary cross-entropy with logits.

    Padding rows (row weight 0) count in the divisor. An unknown label is NaN, with weight 0.
    """

    weights: Tensor

    def __init__(self, label_weights: list[float], losses: Sequence[str] = ()) -> None:
        super().__init__()
        self.losses = tuple(losses) or ("bce",) * len(label_weights)
        self.register_buffer("weights", torch.tensor(label_weights), persistent=False)

    def forward(
        self,
        logits: Tensor,  # [B, C], or [E, B, C] for the mean over members
        labels: Tensor,  # [B, C]
        row_weights: Tensor | None = None,  # [B], or [B, C] by label; 0 for a padding row
    ) -> Tensor:  # []
        labels = labels.nan_to_num().expand_as(logits)
        losses = label_losses(logits, labels, self.losses)
        if row_weights is not None:
            losses = losses * (row_weights if row_weights.dim() == 2 else row_weights[:, None])
        return (losses.flatten(end_dim=-2).mean(0) * self.weights).sum()


class ContentIDContrastive(nn.Module):
    """Content-ID-Contrastive loss between content vectors and ID embeddings of the same items.

    Example::

        import torch
        from recsys import ContentIDContrastive
        from recsys.config import ContrastiveSettings

        loss = ContentIDContrastive(8, 16, ContrastiveSettings(weight=1.0, dim=4))
        loss(torch.randn(3, 8), torch.randn(3, 16), torch.tensor([4, 5, 4]))
    """

    temperature: Tensor

    def __init__(self, content_dim: int, id_dim: int, settings: ContrastiveSettings) -> None:
        super().__init__()
        self.settings = settings
        self.content_map = nn.Linear(content_dim, settings.dim)
        self.id_map = nn.Linear(id_dim, settings.dim)
        self.register_buffer("temperature", torch.tensor(settings.temperature), persistent=False)

    def forward(
        self,
        content: Tensor,  # [B, content_dim]
        ids: Tensor,  # [B, id_dim]
        items: Tensor,  # [B]
        row_weights: Tensor | None = None,  # [B], 0 for a padding row
    ) -> Tensor:  # []
        """Return the loss of a batch. A collective if `settings.all_ranks` is on."""
        content, ids = self.content_map(content), self.id_map(ids)
        if row_weights is None:
            return self._row_losses(content, ids, items).mean()
        items = items.masked_fill(row_weights == 0, -1)
        return (self._row_losses(content, ids, items) * row_weights).mean()

    def _row_losses(self, content: Tensor, ids: Tensor, items: Tensor) -> Tensor:  # [B]
        if self.settings.normalize:
            content, ids = (F.normalize(side, dim=-1, eps=1e-5) for side in (content, ids))
        if self.settings.variant == "published":
            return self._published(content, ids)
        return self._in_batch(content, ids, items)

    def _published(self, content: Tensor, ids: Tensor) -> Tensor:  # [B, D], [B, D] -> [B]
        """Return the mean of L_c2i = CE([z_i . z_c, z_i_neg . z_c] / tau, 0) and of L_i2c likewise.

        Negatives are K random rows of the batch, which may be the row itself.
        """
        shape = len(content), self.settings.num_negatives
        negatives = torch.randint(len(content), shape, device=content.device)  # [B, K]
        positive = (content * ids).sum(-1, keepdim=True)  # [B, 1]
        content_to_id = torch.einsum("bd,bkd->bk", content, ids[negatives])
        id_to_content = torch.einsum("bd,bkd->bk", ids, content[negatives])
        target = torch.zeros(len(content), dtype=torch.long, device=content.device)
        losses = []
        for negative in (content_to_id, id_to_content):
            logits = torch.cat([positive, negative], dim=1) / self.temperature
            losses.append(F.cross_entropy(logits, target, reduction="none"))
        return (losses[0] + losses[1]) / 2

    def _in_batch(self, content: Tensor, ids: Tensor, items: Tensor) -> Tensor:  # [B]
        """Compute cross-entropy in both directions against rows of other items, without padding.

        A collective if `settings.all_ranks` is on.
        """
        all_content, all_ids, all_items, first_row = content, ids, items, 0  # [G, D] twice, [G]
        if self.settings.all_ranks and _has_other_ranks():
            sides, first_row = gather_rows_with_gradient(torch.cat([content, ids], dim=1))
            all_content, all_ids = sides.chunk(2, dim=1)
            with torch.no_grad():  # in float64 an id is exact
                gathered, _ = gather_rows_with_gradient(items.double().unsqueeze(1))
            all_items = gathered[:, 0].to(items.dtype)
        rows = torch.arange(len(items), device=items.device)
        positive = rows + first_row  # [B]
        is_excluded = (items[:, None] == all_items[None, :]) | (all_items == -1)  # [B, G]
        is_excluded[rows, positive] = False
        content_to_id = content @ all_ids.T / self.temperature
        if all_content is content:
            id_to_content = content_to_id.T  # the same products
        else:
            id_to_content = ids @ all_content.T / self.temperature
        losses = [
            F.cross_entropy(logits.masked_fill(is_excluded, -torch.inf), positive, reduction="none")
            for logits in (content_to_id, id_to_content)
        ]
        return (losses[0] + losses[1]) / 2


def _has_other_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


PADDING = -1  # replaces the item of a padding row
LOWEST = -1e30  # score of an excluded item; finite, as softmax of infinities has no gradient


def in_history(batch: Batch, items: Tensor) -> Tensor:  # int64 [K] -> bool [B, K]
    """Return which items each row has in its history; an item may be there several times."""
    history = batch.history.jagged()
    ascending, order = items.sort()
    first = torch.searchsorted(ascending, ascending)  # the first index of each item, [K]
    seen_items = batch.history.items[history.index]
    indices = torch.searchsorted(ascending, seen_items).clamp(max=len(items) - 1)
    indices = torch.where(ascending[indices] == seen_items, indices, len(items))
    is_seen = items.new_zeros((len(batch.target.items), len(items) + 1), dtype=torch.bool)
    is_seen[history.rows, indices] = True  # the last column stands for items not in `items`
    return is_seen[:, first[order.argsort()]]


class RetrievalLoss(nn.Module):
    """Sum over labels of weight times the mean over all rows of the positive rows' cross-entropy.

    Items of rows with label 0 are negatives, too. Excluded are a row's own item, padding rows and,
    with `settings.exclude_seen`, the items of its history.
    """

    weights: Tensor

    def __init__(self, settings: RetrievalSettings, label_weights: list[float]) -> None:
        super().__init__()
        self.in_batch = settings.loss == "in_batch_softmax"
        self.all_ranks, self.exclude_seen = settings.all_ranks, settings.exclude_seen
        self.register_buffer("weights", torch.tensor(label_weights), persistent=False)

    def forward(self, towers: TowerVectors, batch: Batch) -> Tensor:  # []
        """Return the loss of a batch with log Q. A collective if `settings.all_ranks` is on."""
        target_items = batch.target.items.masked_fill(batch.rows.loss_weights == 0, PADDING)
        target_log_q = batch.target.log_q
        assert target_log_q is not None
        vectors, items, log_q = towers.item, target_items, target_log_q  # of candidates
        if not self.in_batch:
            assert towers.negatives is not None and batch.negatives is not None
            vectors, items, log_q = towers.negatives, batch.negatives.items, batch.negatives.log_q
        if self.all_ranks and _has_other_ranks():
            vectors, _ = gather_rows_with_gradient(vectors.contiguous())
            with torch.no_grad():  # in float64 an id is exact
                numbers = torch.stack([items.double(), log_q.double()], dim=1)
                numbers, _ = gather_rows_with_gradient(numbers)
            items, log_q = numbers[:, 0].to(items.dtype), numbers[:, 1].to(log_q.dtype)
        is_excluded = (items == batch.target.items.unsqueeze(1)) | (items == PADDING)  # [B, K]
        if self.exclude_seen:
            is_excluded |= in_history(batch, items)
        positives = (towers.scores - target_log_q.unsqueeze(1)).unbind(dim=1)  # C of [B]
        losses = []
        for query, positive in zip(towers.query.unbind(dim=1), positives, strict=True):
            # [B, K] may be large: one product, filled in place, and no copy beside the positive.
            scores = torch.addmm(-log_q, query, vectors.T).masked_fill_(is_excluded, LOWEST)
            losses.append(F.softplus(scores.logsumexp(dim=1) - positive))
        counts = batch.labels.nan_to_num() * batch.rows.label_loss_weights  # [B, C]
        # The mean is over all rows, so that each positive has the same weight on any rank.
        return ((torch.stack(losses, dim=1) * counts).mean(0) * self.weights).sum()


class CodeLoss(nn.Module):
    """Weight times the mean over all rows of the cross-entropy of positive rows' codes, if any."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, scored: CodeLogits, batch: Batch) -> Tensor:  # []
        counts = (batch.labels.nan_to_num() * batch.rows.label_loss_weights)[:, 0]
        return -(scored.log_probs * counts * scored.has_codes).mean() * self.weight
