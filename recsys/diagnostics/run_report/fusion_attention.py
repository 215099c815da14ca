"""Records the attention of the Fusion-Q-Former's queries to each modality, by layer.

Shapes: U items of a call, T tokens of all modalities, Q queries, S = Q + T keys, H heads,
D dimension, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.content.branch import ContentBranch
from recsys.content.fusion import ConcatFusion, FusionQFormer, JointSelfAttention
from recsys.diagnostics.run_report.page import Drawing, Section, drawn, new_figure

TITLE = "Attention of the fusion"


def attention_weights(
    attention: JointSelfAttention,
    x: Tensor,  # [U, S, D]
    mask: Tensor,  # [U, S]
    num_outputs: int,
) -> Tensor:  # [U, num_outputs, H, S]
    """Return the softmax weights with which `attention` averages its values."""
    heads = (attention.num_heads, x.shape[-1] // attention.num_heads)
    query = attention.query(x[:, :num_outputs]).unflatten(-1, heads)
    key = attention.key(x).unflatten(-1, heads)
    scores = torch.einsum("uqhd,ushd->uqhs", query.float(), key.float()) * attention.scale
    return scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=-1)


@dataclass
class MeanAttention:
    """Attention of one layer, summed over items; `mean` averages it.

    Rows are the queries, and last the result of even attention to all tokens. The first column is
    the sum over all queries, each further column the sum over one modality's tokens.
    """

    sums: Tensor  # float64 [Q + 1, 1 + M]
    counts: Tensor  # int64 [1 + M], items that have the modality

    @staticmethod
    def zeros(num_queries: int, num_modalities: int) -> MeanAttention:
        """Return the attention of no items."""
        sums = torch.zeros(num_queries + 1, num_modalities + 1, dtype=torch.float64)
        return MeanAttention(sums, torch.zeros(num_modalities + 1, dtype=torch.long))

    @property
    def mean(self) -> Tensor:  # [Q + 1, 1 + M]
        """Return the mean over the items that have the modality; NaN if none has."""
        return self.sums / self.counts

    def add(
        self,
        weights: Tensor,  # [U, Q, S], mean of the heads
        mask: Tensor,  # [U, S]
        column: Tensor,  # int64 [S], 0 for a query, 1 + modality for a token
    ) -> None:
        """Add the attention of some items."""
        even = mask / mask.sum(dim=1, keepdim=True)  # [U, S]
        member = F.one_hot(column, len(self.counts)).double()  # [S, 1 + M]
        there = mask.double() @ member > 0  # [U, 1 + M]
        shares = torch.cat([weights, even[:, None]], dim=1).double() @ member  # [U, Q + 1, 1 + M]
        self.sums += (shares * there[:, None]).sum(dim=0).cpu()
        self.counts += there.sum(dim=0).cpu()


@dataclass
class _Recorder:
    """Hooks that add up the attention of each layer while the fusion runs."""

    fusion: FusionQFormer
    layers: list[MeanAttention]
    column: Tensor = field(default_factory=lambda: torch.zeros(0))  # [S], of the current call

    def begin(self, _: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        self.column = F.pad(inputs[2] + 1, (len(self.fusion.queries), 0))

    @torch.no_grad()
    def add(self, layer: int, attention: JointSelfAttention, inputs: tuple[Tensor, Tensor]) -> None:
        x, mask = inputs[:2]
        weights = attention_weights(attention, x, mask, len(self.fusion.queries))
        self.layers[layer].add(weights.mean(dim=2), mask, self.column)


@contextmanager
def recorded_attention(
    fusion: nn.Module | None, num_modalities: int
) -> Iterator[list[MeanAttention]]:
    """Yield the attention by layer of all items fused meanwhile; [] for fusions without queries."""
    if not isinstance(fusion, FusionQFormer):
        yield []
        return
    sizes = len(fusion.queries), num_modalities
    recorder = _Recorder(fusion, [MeanAttention.zeros(*sizes) for _ in fusion.layers])
    handles = [fusion.register_forward_pre_hook(recorder.begin)]
    for index, layer in enumerate(fusion.layers):
        assert isinstance(layer.attention, JointSelfAttention)
        handles.append(
            layer.attention.register_forward_pre_hook(
                lambda module, inputs, index=index: recorder.add(index, module, inputs)
            )
        )
    try:
        # Compiled code would not run hooks that were registered after compilation.
        with torch.compiler.set_stance("force_eager"):
            yield recorder.layers
    finally:
        for handle in handles:
            handle.remove()


def fusion_attention(branch: ContentBranch | None, layers: list[MeanAttention]) -> Section:
    """Return the section on recorded attention; only words for a model without queries."""
    if branch is None:
        return Section(TITLE, ["The model has no content branch, so nothing is fused."])
    if isinstance(branch.fusion, ConcatFusion):
        reason = (
            "ConcatFusion has no queries: it puts the mean tokens of all modalities side by side "
            "through one linear map, so that there is no attention to show."
        )
        return Section(TITLE, [reason])
    if not layers:
        name = type(branch.fusion).__name__
        return Section(TITLE, [f"{name} is no Fusion-Q-Former: it has no queries to show."])
    modalities = list(branch.encoders)
    drawings = [
        _heat_map(index, len(layers), layer, modalities) for index, layer in enumerate(layers)
    ]
    words = [
        "Each query of the Fusion-Q-Former spreads an attention of 1 over the queries and the "
        "tokens of an item. It prefers a modality where its share is above that of even attention."
    ]
    if isinstance(branch.fusion, FusionQFormer) and branch.fusion.linear is not None:
        words.append("What the queries say is added to a linear map of all modalities.")
    return Section(TITLE, words, drawings)


def _heat_map(index: int, count: int, layer: MeanAttention, modalities: list[str]) -> Drawing:
    mean = layer.mean.numpy()
    num_queries = len(mean) - 1
    figure, (axes,) = new_figure(1)
    figure.set_size_inches(11, 1.7 + 0.5 * len(mean))
    axes.imshow(mean, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(mean):
        colour = "white" if value > 0.6 else "black"
        shown = f"{value:.3f}" if value == value else "–"
        axes.text(column, row, shown, ha="center", va="center", color=colour)
    names = [
        f"{name}\n{items:,} items" for name, items in zip(modalities, layer.counts[1:].tolist())
    ]
    axes.set_xticks(range(len(names) + 1), ["queries", *names], parse_math=False)
    rows = [f"query {number}" for number in range(1, num_queries + 1)]
    axes.set_yticks(range(len(mean)), [*rows, "even attention"])
    axes.axhline(num_queries - 0.5, color="white", linewidth=4)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_title(f"layer {index + 1} of {count}")
    caption = (
        f"Mean attention in layer {index + 1}, averaged over heads and over {layer.counts[0]:,} "
        "items; a modality counts only items that have it, so that a row need not add up to 1. "
        "Tokens of one modality are added up. Last row: the same attention to every token."
    )
    return drawn(f"attention-layer-{index + 1}", figure, caption)
