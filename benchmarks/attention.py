"""Target attention over histories of uneven lengths: padded, in buckets, nested, or jagged.

    python -m benchmarks.attention

The same DIN attention (an MLP over item, target, difference and product), forward and backward, in
five forms that give the same numbers, on histories whose lengths are spread evenly from 0 to the
longest, and whose items repeat by Zipf's law:

- padded: to the longest, the four inputs of the MLP side by side, as DIN is usually written;
- padded, split: the first layer's weight cut in four, so that three of the four are computed once
  per item or per target;
- buckets: padded and split, in eight buckets of rows of like length;
- nested: padded and split, on PyTorch's nested tensors instead of padding;
- jagged: the product's form, an index into unique items.

Shapes: B rows, L longest history, N items of all histories, U unique items, D dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.results import RESULTS, Result, write_result
from recsys.data.jagged_history import JaggedHistory
from recsys.distributed.ranks import keep_freed_memory
from recsys.ranking.layers.target_attention import TargetAttention

NUM_BUCKETS = 8
NUM_ITEMS = 100_000


class Histories:
    """Random targets and histories, and the attention over them in each form."""

    def __init__(self, rows: int, longest: int, dim: int, seed: int = 0) -> None:
        """Draw lengths, items and targets from the seed."""
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.attention = TargetAttention(dim, 0, [64, 16])
        self.lengths = torch.from_numpy(rng.permutation(np.linspace(0, longest, rows).astype(int)))
        places = np.exp(rng.random(int(self.lengths.sum())) * np.log(NUM_ITEMS)).astype(int)
        unique, index = np.unique(places, return_inverse=True)
        self.index = torch.from_numpy(index)
        self.items = torch.randn(len(unique), dim, requires_grad=True)
        self.target = torch.randn(rows, dim, requires_grad=True)

    def padded(self) -> Tensor:
        """Compute [B, D] over padded histories, with the four inputs of the MLP concatenated."""
        places, mask = self._padded_places(self.lengths, self.index)
        history, target = (
            self.items[places],
            self.target.unsqueeze(1).expand(-1, places.shape[1], -1),
        )
        pairs = torch.cat([history, target, history - target, history * target], dim=-1)
        return self._weighted(self.attention.score(pairs).squeeze(-1), history, mask)

    def padded_split(self) -> Tensor:
        """Compute [B, D] over padded histories, with the first layer's weight split."""
        return self._split(self.target, *self._padded_places(self.lengths, self.index))

    def buckets(self) -> Tensor:
        """Compute [B, D] over buckets of rows of similar length, each padded, weight split."""
        order = self.lengths.argsort()
        starts = torch.cumsum(self.lengths, 0) - self.lengths
        parts = []
        for rows in order.chunk(NUM_BUCKETS):
            lengths = self.lengths[rows]
            first = torch.repeat_interleave(starts[rows], lengths)
            within = torch.arange(len(first)) - torch.repeat_interleave(
                lengths.cumsum(0) - lengths, lengths
            )
            places, mask = self._padded_places(lengths, self.index[first + within])
            parts.append(self._split(self.target[rows], places, mask))
        return torch.cat(parts)[order.argsort()]

    def nested(self) -> Tensor:
        """Compute [B, D] on nested tensors, with the first layer's weight split."""
        of_item, of_target, of_product, bias = self._weights()
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(self.lengths)
        longest = int(self.lengths.max())
        history = torch.nested.nested_tensor_from_jagged(
            self.items[self.index], offsets, max_seqlen=longest
        )
        hidden = history @ of_item + (history * self.target.unsqueeze(1)) @ of_product
        hidden = hidden + (self.target @ of_target + bias).unsqueeze(1)
        weights = torch.softmax(self.attention.score[1:](hidden), dim=1)
        # The sum over a nested dimension has no backward (torch 2.13).
        return torch.segment_reduce((weights * history).values(), "sum", lengths=self.lengths)

    def jagged(self) -> Tensor:
        """Compute [B, D] with the product's attention over unique items."""
        history = JaggedHistory.of(self.index, self.lengths, len(self.items))
        output = self.attention(
            self.target, self.items, history, self.target.new_zeros(len(self.index), 0)
        )
        return output[:, : self.items.shape[1]]

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = self.attention.score[0]
        of_item, of_target, of_difference, of_product = first.weight.chunk(4, dim=1)  # type: ignore[operator]
        return (
            (of_item + of_difference).T,
            (of_target - of_difference).T,
            of_product.T,
            first.bias,  # type: ignore[return-value]
        )

    def _split(
        self,
        target: Tensor,  # [B, D]
        places: Tensor,  # [B, L]
        mask: Tensor,  # bool [B, L]
    ) -> Tensor:  # [B, D]
        of_item, of_target, of_product, bias = self._weights()
        history = self.items[places]
        hidden = history @ of_item + (history * target.unsqueeze(1)) @ of_product
        hidden = hidden + (target @ of_target + bias).unsqueeze(1)
        return self._weighted(self.attention.score[1:](hidden).squeeze(-1), history, mask)

    @staticmethod
    def _weighted(
        scores: Tensor,  # [B, L]
        history: Tensor,  # [B, L, D]
        mask: Tensor,  # bool [B, L]
    ) -> Tensor:  # [B, D]
        weights = torch.softmax(scores.masked_fill(~mask, -1e4), dim=1) * mask
        return torch.einsum("bl,bld->bd", weights, history)

    @staticmethod
    def _padded_places(
        lengths: Tensor,  # [B]
        index: Tensor,  # [N]
    ) -> tuple[Tensor, Tensor]:  # places [B, L], mask bool [B, L]
        mask = torch.arange(max(int(lengths.max()), 1)) < lengths.unsqueeze(1)
        places = torch.zeros(mask.shape, dtype=torch.long)
        places[mask] = index
        return places, mask


FORMS: dict[str, Callable[[Histories], Tensor]] = {
    "padded": Histories.padded,
    "padded, split": Histories.padded_split,
    "buckets": Histories.buckets,
    "nested": Histories.nested,
    "jagged": Histories.jagged,
}


def milliseconds(histories: Histories, form: str, factor: Tensor) -> float:
    """Time one forward and backward; `factor` [B, D] multiplies the output."""
    start = time.perf_counter()
    (FORMS[form](histories) * factor).sum().backward()
    return (time.perf_counter() - start) * 1e3


def check_equal(histories: Histories) -> None:
    """Check that all forms give the same numbers.

    Raises:
        AssertionError: the numbers of one form differ.
    """
    expected = histories.padded()
    for form in FORMS:
        torch.testing.assert_close(FORMS[form](histories), expected, atol=1e-4, rtol=1e-4, msg=form)


def attention(
    rows: int = 512,
    dim: int = 64,
    longest: tuple[int, ...] = (10, 50, 200, 1000),
    rounds: int = 5,
    results: Path = RESULTS,
) -> None:
    """Measure each form in turns and write table and plot.

    Args:
        rows: rows of the batch.
        dim: dimension of the vectors.
        longest: histories have 0 to this many items.
        rounds: rounds, of which the median is taken.
        results: folder to write to.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    records = []
    for length in longest:
        histories = Histories(rows, length, dim)
        check_equal(histories)
        factor = torch.randn(rows, dim)
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for round_number in range(rounds + 1):
            for form in FORMS:
                taken = milliseconds(histories, form, factor)
                if round_number:  # the first round warms up
                    times[form].append(taken)
        medians = {form: median(values) for form, values in times.items()}
        records.append({"longest": length, "items": len(histories.index), "milliseconds": medians})
    write_result(_result(records), results)


def _result(records: list[dict]) -> Result:  # type: ignore[type-arg]
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for form in FORMS:
            times = [record["milliseconds"][form] for record in records]
            axes.loglog([record["items"] for record in records], times, marker="o", label=form)
        axes.set(xlabel="history items in the batch", ylabel="ms, forward and backward")
        axes.legend()

    return Result(
        name="attention",
        title="Target attention over uneven histories, one thread",
        records=records,
        columns=["histories of 0 to", "items", *(f"{form}, ms" for form in FORMS)],
        rows=[
            [
                str(record["longest"]),
                f"{record['items']:,}",
                *(f"{record['milliseconds'][form]:.1f}" for form in FORMS),
            ]
            for record in records
        ],
        draw=draw,
    )


if __name__ == "__main__":
    auto_cli(attention, as_positional=False)
