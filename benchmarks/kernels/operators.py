"""Time each kernel beside its PyTorch reference, forward and backward, at several sizes.

    python -m benchmarks.kernels.operators

A ratio is the median over rounds of the ratio within a round, in one process of one thread.

Shapes: B rows, L history, D dimension, F sparse features.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.results import RESULTS, Result, require_other_folder, write_result
from recsys.config import HistorySettings
from recsys.content.branch import HistoryMap
from recsys.content.vectors import ContentVectors, StoredHistory
from recsys.data.jagged_history import JaggedHistory
from recsys.distributed.ranks import keep_freed_memory
from recsys.kernels import choose_kernels
from recsys.ranking.dlrm import DotInteraction
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.target_attention import TargetAttention

NUM_ITEMS = 100_000


@dataclass(frozen=True)
class Size:
    """Sizes of a row: of target attention with `units`, of content interest with `modalities`."""

    rows: int
    dim: int
    history: int = 0
    units: tuple[int, ...] = ()
    fields: int = 26
    modalities: int | None = None

    @property
    def name(self) -> str:
        if self.modalities is not None:
            spaces = f", similarities in {1 + self.modalities} spaces" if self.modalities else ""
            return f"content interest, {self.rows} x {self.history} x {self.dim}{spaces}"
        if not self.units:
            return f"dot interaction, {self.rows} x {self.fields + 1} x {self.dim}"
        return f"attention {list(self.units)}, {self.rows} x {self.history} x {self.dim}"


SIZES = [
    Size(8192, 16),
    Size(8192, 64),
    Size(512, 16),
    Size(512, 64, 50, (64, 16)),
    Size(8192, 16, 50, (256, 64)),
    Size(8192, 16, 20, (256, 64)),
    Size(8192, 16, 5, (256, 64)),
    Size(8192, 64, 5, (64, 16)),
    Size(8192, 64, 2, (64, 16)),
    Size(512, 64, 50, modalities=0),
    Size(512, 64, 50, modalities=2),
]
QUICK_SIZES = [Size(8, 4, fields=3), Size(8, 4, 3, (6, 3)), Size(8, 4, 3, modalities=1)]


def build_pass(size: Size) -> Callable[[], None]:
    """Return a forward and backward pass on random inputs of a size."""
    torch.manual_seed(0)
    target = torch.randn(size.rows, size.dim, requires_grad=True)
    module: nn.Module
    inputs: tuple[Any, ...]
    if size.modalities is not None:
        module = StoredContentInterest(size.dim, size.modalities)
        inputs = content_inputs(size.rows, size.dim, size.modalities, _history(size))
    elif size.units:
        module, history = TargetAttention(size.dim, 1, list(size.units)), _history(size)
        items = torch.randn(history.num_items, size.dim, requires_grad=True)
        inputs = (target, items, history, torch.rand(len(history.index), 1).round())
    else:
        module = DotInteraction(size.fields)
        inputs = (target, torch.randn(size.rows, size.fields, size.dim, requires_grad=True))
    factor: Tensor = torch.randn(module(*inputs).shape)

    def run() -> None:
        module.zero_grad()
        for leaf in inputs[:2]:
            leaf.grad = None
        module(*inputs).backward(factor)

    return run


def _history(size: Size) -> JaggedHistory:
    num_positions = size.rows * size.history
    drawn = torch.exp(torch.rand(num_positions) * torch.log(torch.tensor(float(NUM_ITEMS)))).long()
    unique, index = drawn.unique(return_inverse=True)
    return JaggedHistory.of(index, torch.full((size.rows,), size.history), len(unique))


def operators(rounds: int = 7, quick: bool = False, results: Path = RESULTS) -> None:
    """Measure each size by turns; `quick` sizes give figures that mean nothing."""
    require_other_folder(quick, results)
    torch.set_num_threads(1)
    keep_freed_memory()
    choose_kernels("native")
    records = []
    for size in QUICK_SIZES if quick else SIZES:
        run = build_pass(size)
        times: dict[str, list[float]] = {"torch": [], "native": []}
        for number in range(rounds + 1):  # the first warms up
            for kind, seconds in times.items():
                choose_kernels(kind)  # type: ignore[arg-type]
                begin = time.perf_counter()
                run()
                if number:
                    seconds.append(time.perf_counter() - begin)
        ratios = [reference / kernel for reference, kernel in zip(times["torch"], times["native"])]
        milliseconds = {kind: 1e3 * median(seconds) for kind, seconds in times.items()}
        records.append({"benchmark": "kernels", "size": size.name, **milliseconds, "x": ratios})
    write_result(_result(records), results)


def _result(records: list[dict[str, Any]]) -> Result:
    columns = ["forward and backward", "PyTorch, ms", "kernel, ms", "x (lowest to highest)"]
    rows = [
        [
            record["size"],
            f"{record['torch']:.1f}",
            f"{record['native']:.1f}",
            f"{median(record['x']):.2f} ({min(record['x']):.2f} to {max(record['x']):.2f})",
        ]
        for record in records
    ]

    return Result("kernels", "Kernels beside their references", records, columns, rows)


class StoredContentInterest(nn.Module):
    """History map, attention and, with modalities, the similarities of a history in a bank."""

    def __init__(self, dim: int, num_modalities: int) -> None:
        super().__init__()
        settings = HistorySettings(similarity_features=num_modalities > 0)
        self.map = HistoryMap(dim, settings)
        self.interest = ContentInterest(dim, num_modalities, 1, settings)

    def forward(
        self,
        target: Tensor,  # [B, D]
        modalities: Tensor,  # [B, M, D]
        rows: Tensor,  # [U, D + M * D]
        history: JaggedHistory,
        parallel: Tensor,  # [N, 1]
    ) -> Tensor:
        dim, num_modalities = target.shape[1], modalities.shape[1]

        def read() -> tuple[Tensor, Tensor]:
            mean_tokens = rows[:, dim:].reshape(len(rows), num_modalities, dim)
            return self.map(rows[:, :dim]), mean_tokens

        content = ContentVectors(
            target,
            None,
            modalities,
            None,
            read=read,
            read_stored=lambda: StoredHistory(rows, self.map.matrix()),
        )
        interest: Tensor = self.interest(content, history, parallel)
        return interest


def content_inputs(
    rows: int, dim: int, num_modalities: int, history: JaggedHistory
) -> tuple[Tensor, Tensor, Tensor, JaggedHistory, Tensor]:
    """Return random inputs of `StoredContentInterest`."""
    target = torch.randn(rows, dim, requires_grad=True)
    modalities = torch.randn(rows, num_modalities, dim, requires_grad=True)
    stored = torch.randn(history.num_items, (1 + num_modalities) * dim + 1)[:, :-1]
    return target, modalities, stored, history, torch.rand(len(history.index), 1).round()


if __name__ == "__main__":
    auto_cli(operators, as_positional=False)
