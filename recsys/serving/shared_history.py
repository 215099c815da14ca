"""The history of one user for many candidates, with the arithmetic of `JaggedHistory`.

All N rows have the same history, so dense products replace an index over N * L places. Every
operation can be traced by torch.export with N and L dynamic. Places that a row does not keep count
in no sum, maximum or softmax.

Shapes: N candidates, U history items, L places of each row (U, or fewer after a selection),
D dimension, K any width. Flat tensors [N * L] hold one row of L places after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SharedHistory:
    """The same history for each candidate; the methods are those of `JaggedHistory`."""

    num_rows: int  # N
    num_items: int  # U
    device: torch.device
    places: Tensor | None = None  # int64 [N, L], the item at each place; None: all, in order
    mask: Tensor | None = None  # bool [N, L], the places that count; None: all
    # Places that `highest` and `latest` have returned, and which of them count.
    _selected: list[tuple[Tensor, Tensor | None]] = field(default_factory=list, repr=False)

    @property
    def longest(self) -> int:
        return self.num_items if self.places is None else self.places.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Number of places that count in each row: int64 [N]."""
        if self.mask is not None:
            return self.mask.sum(dim=1)
        return torch.full((self.num_rows,), self.longest, device=self.device)

    @property
    def index(self) -> Tensor:
        """The item at each place: int64 [N * L]."""
        if self.places is None:
            return self.spread_items(torch.arange(self.num_items, device=self.device))
        return self.places.reshape(-1)

    @property
    def rows(self) -> Tensor:
        """The row of each place: int64 [N * L]."""
        return self.spread(torch.arange(self.num_rows, device=self.device).unsqueeze(1)).squeeze(1)

    @property
    def ages(self) -> Tensor:
        """Number of later places of the same row: int64 [N * L]."""
        assert self.mask is None
        return self.spread_items(self.longest - 1 - torch.arange(self.longest, device=self.device))

    def spread_items(self, values: Tensor) -> Tensor:
        """Repeat [L] for each row: [N * L]."""
        return values.unsqueeze(0).expand(self.num_rows, -1).reshape(-1)

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same places: a selection differs between rows."""
        return self.places is None

    def of_one_row(self, values: Tensor) -> Tensor:
        """Map [N * L, K] with equal values in all rows to the values of one row: [L, K]."""
        return values.view(self.num_rows, self.longest, values.shape[1])[0]

    def unindexed(self) -> SharedHistory:
        return self

    def gather(self, items: Tensor) -> Tensor:
        """Map [U, K] -> [N * L, K]: the item of each place."""
        if self.places is None:
            return items.repeat(self.num_rows, 1)  # a copy, as callers add to the result in place
        return items.index_select(0, self.index)

    def spread(self, rows: Tensor) -> Tensor:
        """Map [N, K] -> [N * L, K]: the row of each place."""
        spread = rows.unsqueeze(1).repeat(1, self.longest, 1)
        return spread.view(self.num_rows * self.longest, rows.shape[1])

    def sum(self, values: Tensor) -> Tensor:
        """Sum [N * L, K] over the places of each row: [N, K]."""
        return self._by_row(values, fill=0.0).sum(dim=1)

    def dot(self, queries: Tensor, items: Tensor) -> Tensor:
        """Return the dot product of row [N, D] and item [U, D] at each place: [N * L]."""
        products = queries @ items.T
        return (products if self.places is None else products.gather(1, self.places)).reshape(-1)

    def weighted_sum(self, weights: Tensor, items: Tensor) -> Tensor:
        """Return the sum of items [U, D] with weights [N * L], by row: [N, D]."""
        by_row = self._by_row(weights.unsqueeze(1), fill=0.0).squeeze(2)
        if self.places is not None:
            empty = weights.new_zeros(self.num_rows, self.num_items)
            by_row = empty.scatter_add(1, self.places, by_row)
        return by_row @ items

    def softmax(self, scores: Tensor) -> Tensor:
        """Normalise [N * L] or [N * L, K] over the places of each row."""
        columns = scores if scores.dim() == 2 else scores.unsqueeze(1)
        softmax = self._by_row(columns, fill=-torch.inf).softmax(dim=1)
        if self.mask is not None:  # NaN in a row without a place that counts
            softmax = softmax.where(self.mask.unsqueeze(2), 0.0)
        return softmax.reshape(scores.shape)

    def maximum(self, values: Tensor, lowest: float) -> Tensor:
        """Return the maxima of [N * L, K] and `lowest`, by row: [N, K]."""
        floor = values.new_full((self.num_rows, 1, values.shape[1]), lowest)
        return torch.cat([floor, self._by_row(values, lowest)], dim=1).amax(dim=1)

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """Return [N * L] as [N, L], with `fill` in places that do not count."""
        return self._by_row(values.unsqueeze(1), fill).squeeze(2)

    def ones_like(self, values: Tensor) -> Tensor:
        """Return 1 for each place that counts, 0 for others: [N * L], of the type of `values`."""
        return torch.ones_like(values) if self.mask is None else self.mask.reshape(-1).to(values)

    def highest(self, scores: Tensor, count: int) -> Tensor:
        """Return flat places of each row's `count` highest scores [N * L]; the later wins a tie."""
        assert self.mask is None
        by_row = scores.reshape(self.num_rows, self.longest)
        order = self.longest - 1 - by_row.flip(1).argsort(dim=1, descending=True, stable=True)
        places = order.narrow(1, 0, torch.sym_min(self.longest, count)).sort(dim=1).values
        first = torch.arange(self.num_rows, device=self.device).unsqueeze(1) * self.longest
        self._selected.append(((places + first).reshape(-1), None))
        return self._selected[-1][0]

    def latest(self, is_eligible: Tensor, count: int) -> Tensor:
        """Return the flat places of the `count` latest eligible ones [N * L] of each row."""
        places = self.highest(is_eligible.float(), count)
        mask = is_eligible[places].reshape(self.num_rows, -1)
        self._selected.append((places.clone(), mask))
        return self._selected[-1][0]

    def select(self, places: Tensor) -> SharedHistory:
        masks = [mask for selected, mask in self._selected if selected is places]
        if not masks:
            raise ValueError(
                "the model selects history items by their values, so rows keep different numbers "
                "of them, which a package cannot hold; select by JaggedHistory.highest or latest"
            )
        items = self.index[places].reshape(self.num_rows, -1)
        return SharedHistory(self.num_rows, self.num_items, self.device, items, masks[0])

    def _by_row(self, values: Tensor, fill: float) -> Tensor:
        """View [N * L, K] as [N, L, K], with `fill` in places that do not count."""
        by_row = values.reshape(self.num_rows, self.longest, values.shape[1])
        if self.mask is None:
            return by_row
        return by_row.where(self.mask.unsqueeze(2), fill)
