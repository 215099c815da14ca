"""The ranking model of a run as one graph: vectors of a user and N candidates -> logits.

The graph holds the history map and the ranking model. Looking vectors up is left to the scorer,
so that tables and content vectors stay in files that are mapped into memory.

Shapes: N candidates, L history items, D dimension of ID vectors, E width of content vectors
(D_content * (1 + M), as the memory bank keeps them), F dense features, P parallel lists, C labels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from recsys.content.vectors import ContentVectors
from recsys.ranking.vectors import IDVectors
from recsys.serving.exported_graph import ExportedGraph
from recsys.serving.shared_history import SharedHistory


@dataclass
class RankingInputs:
    """Inputs of the graph, in the order of its arguments.

    pooled: one [N, D_table] per pooled feature; dense: [N, F]; target: [N, D]; history: [L, D];
    parallel: [L, P]; target_items: int64 [N]; history_items: int64 [L]; target_content: [N, E] and
    history_content: [L, E], E = 0 without content; target_in_bank: [N, E], the memory bank's vector
    of each candidate, by which long histories are searched; [N, 0] if they are not. further: one
    [K, D] per further history, of K events of its own; further_parallel: one [K, P] each;
    further_content: one [K, E] each, [K, 0] if its content is not read.
    """

    pooled: list[Tensor]
    dense: Tensor
    target: Tensor
    history: Tensor
    parallel: Tensor
    target_items: Tensor
    history_items: Tensor
    target_content: Tensor
    history_content: Tensor
    target_in_bank: Tensor
    further: list[Tensor] = field(default_factory=list)
    further_parallel: list[Tensor] = field(default_factory=list)
    further_content: list[Tensor] = field(default_factory=list)

    def arguments(self) -> tuple[object, ...]:
        """Return the graph's arguments; the last three only with further histories."""
        arguments = tuple(vars(self).values())
        return arguments if self.further else arguments[:-3]


@dataclass
class SharedEvents:
    """Stand-in for a `FurtherHistory`: its events are those of every candidate."""

    values: Tensor  # [N * K, P]
    history: SharedHistory
    content: ContentVectors | None  # of the candidates and these events

    def jagged(self) -> SharedHistory:
        """Return the history that all candidates share."""
        return self.history

    def content_of(
        self, content: ContentVectors, num_items: int
    ) -> tuple[ContentVectors | None, SharedHistory]:
        """Return the content vectors of these events, in place of those of the batch."""
        return self.content, self.history


@dataclass
class CandidateBatch:
    """Stand-in for a `Batch`: the fields that ranking models read, for candidates of one user."""

    dense_features: Tensor  # [N, F]
    history_values: Tensor  # [N * L, P]
    history_items: Tensor  # [L]
    target_items: Tensor  # [N]
    history: SharedHistory
    further: list[SharedEvents]
    unscaled_values: Tensor | None = None  # [N * L, P]

    @property
    def recorded_values(self) -> Tensor:
        """The parallel lists before scaling: float32 [N * L, P]."""
        return self.history_values if self.unscaled_values is None else self.unscaled_values

    def jagged_history(self) -> SharedHistory:
        """Return the history that all candidates share."""
        return self.history

    @property
    def row_weights(self) -> Tensor:
        """Ones: no row is padding; float32 [N]."""
        return torch.ones_like(self.target_items, dtype=torch.float32)


class RankingGraph(nn.Module):
    """History map and ranking model over the candidates of one user.

    Args:
        ranking: the ranking model of a run.
        history_map: the map of the history's content vectors; None without content.
        content_dim: width of a content vector; 0 without content.
        top_k: history items kept by a search for the target's content; 0: all.
        further_histories: encodes the histories after the first one.
        scaling: standardises numbers of the model's columns.
    """

    def __init__(
        self,
        ranking: nn.Module,
        history_map: nn.Module | None = None,
        content_dim: int = 0,
        top_k: int = 0,
        further_histories: nn.Module | None = None,
        scaling: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.further_histories, self.scaling = further_histories, scaling
        self.ranking, self.history_map = ranking, history_map
        self.content_dim, self.top_k = content_dim, top_k
        self.eval()

    def forward(self, *arguments: Any) -> Tensor:  # [N, C]
        """Return the logits of the candidates from the arguments of `RankingInputs`."""
        inputs = RankingInputs(*arguments)
        shared = SharedHistory(
            inputs.target.shape[0], inputs.history.shape[0], inputs.target.device
        )
        values = shared.gather(inputs.parallel)
        if self.top_k:
            queries, items = F.normalize(inputs.target_in_bank), F.normalize(inputs.history_content)
            places = shared.highest(shared.dot(queries, items), self.top_k)
            shared, values = shared.select(places), values[places]
        events = [
            self._shared_events(inputs.target_content, *parts)
            for parts in zip(inputs.further_parallel, inputs.further_content, strict=True)
        ]
        batch = CandidateBatch(
            inputs.dense, values, inputs.history_items, inputs.target_items, shared, events
        )
        if self.scaling is not None:
            batch = self.scaling(batch)
        ids = IDVectors(inputs.pooled, inputs.target, inputs.history, further=inputs.further)
        content = self._content(inputs.target_content, inputs.history_content)
        if self.further_histories is not None:
            ids = self.further_histories(ids, content, batch)
        scored = self.ranking(ids, content, batch)
        return (scored if isinstance(scored, Tensor) else scored.logits).float()

    def _content(self, target: Tensor, history: Tensor) -> ContentVectors | None:  # [N, E], [L, E]
        if self.history_map is None:
            return None
        dim = self.content_dim
        modalities = [part[:, dim:].unflatten(1, (-1, dim)) for part in (target, history)]
        mapped = self.history_map(history[:, :dim])
        return ContentVectors(target[:, :dim], mapped, modalities[0], modalities[1])

    def _shared_events(
        self, target: Tensor, parallel: Tensor, content: Tensor
    ) -> SharedEvents:  # [N, E], [K, P], [K, E] or [K, 0]
        shared = SharedHistory(target.shape[0], parallel.shape[0], parallel.device)
        vectors = self._content(target, content) if content.shape[1] else None
        return SharedEvents(shared.gather(parallel), shared, vectors)


# Candidates, history items and events of further histories in the calls in which an exported graph
# must equal the model: none, one, and more than a search keeps.
CHECKED_SIZES = ((2, 3, 4), (1, 1, 0), (3, 0, 2), (1, 0, 1), (4, 70, 70))
TRACED_SIZE = (5, 7, 3)
TOLERANCE = 1e-5
HISTORY_INPUTS = ("history", "parallel", "history_items", "history_content")


def export_graph(
    graph: RankingGraph, shapes: RankingInputs, name: str, path: Path
) -> ExportedProgram:
    """Export the graph for any number of candidates and history items, and write it to a file.

    What a scorer loads from the file is compared to the model. `shapes` are inputs of any values
    with the model's widths; `name` is the ranking model, for messages.

    Raises:
        ValueError: torch.export refuses the model, its graph takes some numbers of candidates or
            items alone, or gives other numbers.
    """
    traced = random_like(shapes, *TRACED_SIZE)
    sizes = {0: torch.export.Dim.AUTO}
    axes = tuple(
        [sizes] * len(part) if isinstance(part, list) else sizes for part in traced.arguments()
    )
    try:
        with torch.no_grad():
            program = torch.export.export(
                graph, traced.arguments(), dynamic_shapes=(axes,), strict=False
            )
            # A region of autocast without operations can be written, but not read.
            program.graph.eliminate_dead_code()
            program.graph_module.recompile()
            _require_any_length(program, traced)
            torch.export.save(program, path)
            compare_graphs(ExportedGraph.load(path), graph, shapes)
    except Exception as error:  # torch.export raises errors of many types
        raise ValueError(
            f"ranking.name '{name}' cannot be exported: {type(error).__name__}: {error}; replace "
            "the operation that torch.export names, or whose shape depends on values"
        ) from error
    return program


def _require_any_length(program: ExportedProgram, inputs: RankingInputs) -> None:
    """Raise a ValueError if the graph fixes a number of candidates, history items or events.

    torch.export fixes or bounds a number in silence where the model branches on it.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for argument, rows in zip(program.graph_signature.user_inputs, _names_of_rows(inputs)):
        length = values[argument].shape[0]
        symbol = length.node.expr if isinstance(length, torch.SymInt) else None
        if (bounds := program.range_constraints.get(symbol)) is None:
            raise ValueError(
                f"the graph fixes the number of {rows} to {length}; read it from tensor.shape, as "
                "len(tensor) is a constant in the graph"
            )
        if bounds.lower > 2 or bounds.upper < sys.maxsize:
            raise ValueError(f"the graph takes {bounds.lower} to {bounds.upper} {rows} only")


def _names_of_rows(inputs: RankingInputs) -> list[str]:
    """Return what the rows of each tensor among the arguments are."""
    names: list[str] = []
    for name, part in vars(inputs).items():
        rows = "history items" if name in HISTORY_INPUTS else "candidates"
        rows = "events of a further history" if name.startswith("further") else rows
        names += [rows] * (len(part) if isinstance(part, list) else 1)
    return names


def compare_graphs(
    graph: Callable[..., Tensor], expected: Callable[..., Tensor], shapes: RankingInputs
) -> None:
    """Require equal outputs of two graphs for any numbers of rows, by an AssertionError."""
    for size in CHECKED_SIZES:
        inputs = random_like(shapes, *size).arguments()
        scores, tolerance = graph(*inputs), {"rtol": TOLERANCE, "atol": TOLERANCE}
        torch.testing.assert_close(scores, expected(*inputs), **tolerance)


def random_like(
    shapes: RankingInputs, num_rows: int, num_items: int, num_events: int
) -> RankingInputs:
    """Return random inputs with the widths of `shapes`; each further history has an event more."""
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor, length: int) -> Tensor:
        if like.dtype == torch.int64:
            return torch.zeros(length, dtype=torch.int64)
        return torch.randn(length, like.shape[1], generator=generator)

    inputs: dict[str, Any] = {
        name: [random(like, num_rows) for like in part]
        if name == "pooled"
        else [random(like, num_events + place) for place, like in enumerate(part)]
        if isinstance(part, list)
        else random(part, num_items if name in HISTORY_INPUTS else num_rows)
        for name, part in vars(shapes).items()
    }
    return RankingInputs(**inputs)
