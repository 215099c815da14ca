"""Item-based collaborative filtering: votes of the history's items on the target.

An item's vector has the mean relative value that each group of users gave it. Similarity is the
adjusted cosine (Sarwar et al. 2001). A row in training leaves out its own user's group, and with it
its label. Training learns no parameter.
Shapes: B batch, U unique history items, N history items of the batch, I items, G groups of users,
D any width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory

NUM_VOTES = 4
# Values of the overall mean that a user's mean begins with, as he may have few.
PRIOR_VALUES = 5.0
# Most groups by default. Time and memory of a step grow with them, too: each row and each item of
# a history has a vector of so many numbers.
MOST_GROUPS = 8192
OPINION_BYTES = 2**30  # of all opinions by default, 2 for each item and group
# Added to sums of similarities and of their squares: a few weakly similar items vote for little.
LEAST_SIMILARITY, LEAST_SQUARE = 0.3, 0.05


def automatic_groups(num_users: int, num_items: int) -> int:
    """Return the number of groups for a table of users: one per user, within the limits."""
    fitting = OPINION_BYTES // (2 * max(num_items, 1))
    return max(1, min(num_users, MOST_GROUPS, fitting))


class CollaborativeFiltering(nn.Module):
    """The vectors of all items [I, G], and the votes that they give; user u is in group `u % G`.

    `column` of `Batch.history.values` is the valued list. In training the share `dropout` of
    targets counts as new.
    """

    item_row_buffers = ("opinions",)  # have a row per item, as the table of items

    opinions: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, column: int, num_items: int, num_groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.column, self.dropout = column, dropout
        # Half precision: opinions are means of few values, and the matrix is I * G large.
        self.register_buffer("opinions", torch.zeros(num_items, num_groups, dtype=torch.float16))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    @torch.no_grad()
    def fill(
        self,
        opinions: Tensor,  # [I, G]; 0 where a group has none
        mean: float,
        deviation: float,
    ) -> None:
        """Set opinions, and the mean and standard deviation of the values; 0 keeps an opinion."""
        self.opinions.copy_(torch.where(opinions == 0, self.opinions.float(), opinions))
        self.mean.fill_(mean)
        self.deviation.fill_(deviation)

    @torch.no_grad()
    def forward(self, history: JaggedHistory, batch: Batch) -> Tensor:  # [B, NUM_VOTES]
        """Return means and sum of the votes, and log(1 + sum of positive similarities)."""
        values = self._relative_values(history, batch.history.recorded_values[:, self.column])
        target = self._opinions_of(batch.target.items)  # [B, G]
        target = target * self._have_opinions(batch.target.items).unsqueeze(1)
        if self.training:
            groups = batch.rows.groups.remainder(target.shape[1]).unsqueeze(1)
            target = target.scatter(1, groups, 0.0)
            target = target * (torch.rand_like(target[:, :1]) >= self.dropout)
        # [U, G] is large with many groups: it is read, but not written again to be shortened.
        items = self._opinions_of(batch.history.items)
        factors = _factors(items) * self._have_opinions(batch.history.items)  # [U]
        similarity = history.dot(target * _factors(target).unsqueeze(1), items)  # [N]
        similarity = similarity * history.gather(factors.unsqueeze(1)).squeeze(1)
        positive = similarity.clamp(min=0)
        square = positive.square()
        weighted = [positive * values, positive, square * values, square, similarity * values]
        sums = history.sum(torch.stack(weighted, dim=1))  # [B, 5]
        length = history.lengths.to(values.dtype)
        votes = [
            sums[:, 0] / (sums[:, 1] + LEAST_SIMILARITY),
            sums[:, 2] / (sums[:, 3] + LEAST_SQUARE),
            sums[:, 4] / (length + 1).sqrt(),
            torch.log1p(sums[:, 1]),
        ]
        return torch.stack(votes, dim=1)

    def _relative_values(self, history: JaggedHistory, values: Tensor) -> Tensor:  # [N] -> [N]
        # Deviations from the overall mean are summed, as sums of values lose their last digits.
        deviations = values - self.mean
        total = history.sum(deviations.unsqueeze(1))
        means = total / (history.lengths.to(values.dtype).unsqueeze(1) + PRIOR_VALUES)
        return (deviations - history.spread(means).squeeze(1)) / self.deviation

    def _opinions_of(self, items: Tensor) -> Tensor:  # [D] -> [D, G]
        """Return the opinions of items; any for an item that is added to a package later."""
        return self.opinions[items.clamp(max=len(self.opinions) - 1)].float()

    def _have_opinions(self, items: Tensor) -> Tensor:  # [D] -> bool [D]
        return items < len(self.opinions)


def _factors(opinions: Tensor) -> Tensor:  # [D, G] -> [D]
    """Return 1 / sqrt(1 + length ** 2): items that few users valued stay short."""
    return (1 + torch.linalg.vector_norm(opinions, dim=1).square()).rsqrt()
