"""The same attentions by fused operations of libraries, beside ours: what was tried and left.

    python -m benchmarks.kernels.libraries

DIN's attention with its matrix per row by `fbgemm.jagged_dense_bmm`, and the scaled dot product by
`scaled_dot_product_attention` of nested tensors. All forms give the same numbers, forward and
backward are timed by turns, on one thread. Writes `kernel_libraries.jsonl`, `.md` and `.png`.

Shapes: B rows, N history items, U unique items, D dimension, H units of the first layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results import RESULTS, Result, require_own_folder, write_result
from recsys.data.jagged_history import JaggedHistory
from recsys.distributed.ranks import keep_freed_memory
from recsys.kernels import choose_kernels
from recsys.ranking.layers.target_attention import DotAttention, TargetAttention


class Attentions:
    """The attentions over one random batch, as functions that return [B, D]."""

    def __init__(self, rows: int, history: int, dim: int) -> None:
        """Draw the batch."""
        torch.manual_seed(0)
        index = torch.randint(rows * history // 3 + 1, (rows * history,))
        lengths = torch.full((rows,), history)
        self.history = JaggedHistory.of(index, lengths, rows * history // 3 + 1)
        self.items = torch.randn(self.history.num_items, dim, requires_grad=True)
        self.target = torch.randn(rows, dim, requires_grad=True)
        self.nothing = torch.zeros(len(index), 0)
        self.din, self.dot = TargetAttention(dim, 0, [64, 16]), DotAttention(dim, 0)

    def din_by_torch(self) -> Tensor:
        """Return DIN's attention by our PyTorch reference."""
        choose_kernels("torch")
        return self.din(self.target, self.items, self.history, self.nothing)

    def din_by_kernel(self) -> Tensor:
        """Return DIN's attention by our kernel."""
        choose_kernels("native")
        return self.din(self.target, self.items, self.history, self.nothing)

    def din_by_fbgemm(self) -> Tensor:
        """Return DIN's attention with the first layer as one product of FBGEMM."""
        first = self.din.score[0]
        of_item, of_target, of_difference, of_product = first.weight.chunk(4, dim=1)  # type: ignore[operator]
        matrix = (of_item + of_difference).T + self.target.unsqueeze(2) * of_product.T  # [B, D, H]
        constant = torch.addmm(first.bias, self.target, (of_target - of_difference).T)  # type: ignore[arg-type]
        history = self.history
        hidden = torch.ops.fbgemm.jagged_dense_bmm(
            history.gather(self.items), history.offsets, matrix, history.longest
        )[0]
        scores = self.din.score[1:](hidden + history.spread(constant)).squeeze(1)
        return history.weighted_sum(history.softmax(scores), self.items)

    def dot_by_torch(self) -> Tensor:
        """Return the scaled dot-product attention of the product."""
        return self.dot(self.target, self.items, self.history, self.nothing)

    def dot_by_nested(self) -> Tensor:
        """Return the scaled dot-product attention by nested tensors."""
        nested, history = torch.nested.nested_tensor_from_jagged, self.history
        ones = torch.arange(len(self.target) + 1)
        query = nested(self.dot.query(self.target), ones, max_seqlen=1)
        items = nested(history.gather(self.items), history.offsets, max_seqlen=history.longest)
        query, items = (part.unsqueeze(2).transpose(1, 2) for part in (query, items))
        attended = F.scaled_dot_product_attention(query, items, items)
        return attended.transpose(1, 2).values().squeeze(1)


FORMS: dict[str, Callable[[Attentions], Tensor]] = {
    "DIN: PyTorch reference": Attentions.din_by_torch,
    "DIN: kernel": Attentions.din_by_kernel,
    "DIN: fbgemm.jagged_dense_bmm": Attentions.din_by_fbgemm,
    "dot product: embedding_bag kernels (ours)": Attentions.dot_by_torch,
    "dot product: SDPA of nested tensors": Attentions.dot_by_nested,
}


def libraries(
    rows: int = 512,
    history: int = 50,
    dim: int = 64,
    rounds: int = 7,
    quick: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measure each form by turns.

    Args:
        rows: B.
        history: items of each history.
        dim: D.
        rounds: number of rounds.
        quick: tiny sizes, whose figures mean nothing.
        results: folder for the figures.
    """
    require_own_folder(quick, results)
    torch.set_num_threads(1)
    keep_freed_memory()
    attentions = Attentions(*((8, 3, 4) if quick else (rows, history, dim)))
    factor = torch.randn(attentions.target.shape)
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    outputs: dict[str, list[Tensor]] = {"DIN": [], "dot": []}
    for name, form in FORMS.items():
        outputs[name[:3]].append(form(attentions).detach())
    for found in outputs.values():
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    for _ in range(rounds):
        for name, form in FORMS.items():
            begin = time.perf_counter()
            form(attentions).backward(factor)
            times[name].append(time.perf_counter() - begin)
    write_result(_result(times), results)


def _result(times: dict[str, list[float]]) -> Result:
    milliseconds = {name: 1e3 * median(seconds) for name, seconds in times.items()}
    records = [
        {"benchmark": "kernel_libraries", "form": name, "seconds": seconds}
        for name, seconds in times.items()
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(milliseconds)[::-1]
        axes.bar_label(axes.barh(names, [milliseconds[name] for name in names]), fmt=" %.1f")
        axes.set_xlabel("ms forward and backward")

    rows = [[name, f"{value:.1f}"] for name, value in milliseconds.items()]
    columns = ["attention", "forward and backward, ms"]
    title = "Attention by operations of libraries"
    return Result("kernel_libraries", title, records, columns, rows, draw)


if __name__ == "__main__":
    auto_cli(libraries, as_positional=False)
