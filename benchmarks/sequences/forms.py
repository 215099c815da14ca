"""Causal attention among the items of histories of uneven lengths, in several forms.

    python -m benchmarks.sequences.forms

Softmax attention of two heads, forward and backward, on histories whose lengths are spread evenly
from 0 to the longest; all forms give the same numbers:

- masked: padded to the longest, scores and a mask as tensors, as SASRec is usually written;
- padded SDPA: padded, and the causal mask of `scaled_dot_product_attention` alone; the product's;
- buckets: the same in eight buckets of rows of like length;
- nested: `scaled_dot_product_attention` of nested tensors (layout `torch.jagged`).

Shapes: B rows, L longest history, T items of all histories, D width, H heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results import RESULTS, Result, write_result
from benchmarks.serving.latency import latencies
from recsys.data.jagged_history import JaggedHistory
from recsys.distributed.ranks import keep_freed_memory
from recsys.ranking.layers.sequences import JaggedSequences

HEADS, NUM_BUCKETS = 2, 8


class Histories:
    """Random keys, values and queries of histories, and the attention over them in each form."""

    def __init__(self, rows: int, longest: int, dim: int, seed: int = 0) -> None:
        """Draw lengths and vectors from the seed."""
        generator = torch.Generator().manual_seed(seed)
        lengths = np.linspace(0, longest, rows).astype(int)
        self.lengths = torch.from_numpy(np.random.default_rng(seed).permutation(lengths))
        total = int(self.lengths.sum())
        self.vectors = torch.randn(total, 3 * dim, generator=generator).requires_grad_()
        self.factors = torch.randn(total, dim, generator=generator)

    def masked(self) -> Tensor:  # [T, D]
        """Attend with a tensor of scores and a mask."""
        sequences, (keys, values, queries) = self._padded(self.vectors, self.lengths)
        longest = keys.shape[2]
        scores = queries @ keys.transpose(2, 3) / math.sqrt(keys.shape[3])
        mask = torch.ones(longest, longest, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=3)
        return sequences.flat((weights @ values).transpose(1, 2).flatten(2))

    def padded(self) -> Tensor:  # [T, D]
        """Attend by SDPA over padded histories."""
        return self._sdpa(self.vectors, self.lengths)

    def buckets(self) -> Tensor:  # [T, D]
        """Attend by SDPA in buckets of rows of similar length."""
        order = self.lengths.argsort()
        starts = torch.cumsum(self.lengths, 0) - self.lengths
        parts, places = [], []
        for rows in order.chunk(NUM_BUCKETS):
            lengths = self.lengths[rows]
            first = torch.repeat_interleave(starts[rows], lengths)
            within = torch.arange(len(first))
            within = within - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
            places.append(first + within)
            parts.append(self._sdpa(self.vectors[places[-1]], lengths))
        return torch.cat(parts)[torch.cat(places).argsort()]

    def nested(self) -> Tensor:  # [T, D]
        """Attend by SDPA of nested tensors."""
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])
        longest = int(self.lengths.max())
        keys, values, queries = (
            torch.nested.nested_tensor_from_jagged(
                part.contiguous(), offsets, min_seqlen=0, max_seqlen=longest
            )
            .unflatten(2, (HEADS, -1))
            .transpose(1, 2)
            for part in self.vectors.chunk(3, dim=1)
        )
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return attended.transpose(1, 2).flatten(2).values()

    def _sdpa(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        sequences, (keys, values, queries) = self._padded(vectors, lengths)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return sequences.flat(attended.transpose(1, 2).flatten(2))

    @staticmethod
    def _padded(
        vectors: Tensor,  # [T, 3 * D]
        lengths: Tensor,  # [B]
    ) -> tuple[JaggedSequences, list[Tensor]]:  # three of [B, H, L, D / H]
        index = torch.arange(len(vectors))
        sequences = JaggedSequences(JaggedHistory.of(index, lengths, len(index)))
        joined = sequences.padded(vectors).unflatten(2, (3, HEADS, -1))
        return sequences, list(joined.permute(2, 0, 3, 1, 4))


FORMS: dict[str, Callable[[Histories], Tensor]] = {
    "masked": Histories.masked,
    "padded SDPA": Histories.padded,
    "buckets": Histories.buckets,
    "nested": Histories.nested,
}


def gradient_of(histories: Histories, form: str) -> Tensor:
    """Run a form forward and backward; return the gradient of the vectors [T, 3 * D]."""
    total = (FORMS[form](histories) * histories.factors).sum()
    return torch.autograd.grad(total, histories.vectors)[0]


def usable_forms(histories: Histories) -> dict[str, str]:
    """Return each form with the reason why it cannot be used here, empty if it can.

    Raises:
        AssertionError: the gradients of a form differ from those of `masked`.
    """
    expected, reasons = gradient_of(histories, "masked"), {}
    for form in FORMS:
        try:
            found = gradient_of(histories, form)
        except (RuntimeError, NotImplementedError) as error:  # nested tensors lack operations
            reasons[form] = str(error).splitlines()[0]
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=form)
        reasons[form] = ""
    return reasons


def forms(
    rows: int = 256,
    dim: int = 32,
    longest: tuple[int, ...] = (64, 200, 1000),
    rounds: int = 4,
    results: Path = RESULTS,
) -> None:
    """Measure each form in turns and write table and plot.

    Args:
        rows: rows of a batch.
        dim: width of keys, values and queries.
        longest: histories have 0 to this many items.
        rounds: rounds, of which the median is taken.
        results: folder to write to.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    records = []
    for length in longest:
        histories = Histories(rows, length, dim)
        reasons = usable_forms(histories)
        ways = {
            form: partial(gradient_of, histories, form)
            for form, reason in reasons.items()
            if not reason
        }
        times = latencies(ways, rounds, time.process_time)
        medians = {form: float(np.median(times[form])) for form in ways}
        records.append({"longest": length, "milliseconds": medians, "refused": reasons})
    write_result(_result(records), results)


def _result(records: list[dict]) -> Result:  # type: ignore[type-arg]
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for form in records[0]["milliseconds"]:
            times = [record["milliseconds"].get(form) for record in records]
            axes.loglog([record["longest"] for record in records], times, marker="o", label=form)
        axes.set(xlabel="items of the longest history", ylabel="ms, forward and backward")
        axes.legend()

    refused = {form: why for form, why in records[0]["refused"].items() if why}
    return Result(
        name="sequence_forms",
        title="Causal attention among the items of uneven histories, one thread",
        records=records,
        columns=["histories of 0 to", *(f"{form}, ms" for form in FORMS)],
        rows=[
            [
                str(record["longest"]),
                *(
                    f"{of:.1f}" if (of := record["milliseconds"].get(form)) else "-"
                    for form in FORMS
                ),
            ]
            for record in records
        ],
        draw=draw,
        reading=["Forward and backward; medians of the time of the processor."]
        + [f"{form}: not possible on CPU: {why}" for form, why in refused.items()],
    )


if __name__ == "__main__":
    auto_cli(forms, as_positional=False)
