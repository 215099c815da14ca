"""A graph takes over the operations of another that differs from it in weights alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from recsys.serving.exported_graph import ExportedGraph


class Small(nn.Module):
    """Weights, one of them shared, a buffer, a constant, and a list among the inputs."""

    def __init__(self, width: int, factor: float = 2.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, 1)
        self.shared = self.first
        self.register_buffer("mean", torch.randn(3))
        self.factor = factor

    def forward(self, parts: list[Tensor], number: Tensor) -> Tensor:
        hidden = self.first(parts[0] - self.mean) + self.shared(parts[1])
        return self.second(hidden) * self.factor + number.unsqueeze(1)


def write(path: Path, module: nn.Module) -> nn.Module:
    """Exports a module for any number of rows."""
    inputs = ([torch.randn(5, 3), torch.randn(5, 3)], torch.randn(5))
    any_number = {0: torch.export.Dim.AUTO}
    program = torch.export.export(
        module, inputs, dynamic_shapes=([any_number] * 2, any_number), strict=False
    )
    torch.export.save(program, path)
    return module


def assert_equal(graph: ExportedGraph, module: nn.Module) -> None:
    for rows in (1, 7):
        parts, number = [torch.randn(rows, 3), torch.randn(rows, 3)], torch.randn(rows)
        torch.testing.assert_close(graph(parts, number), module(parts, number))


def test_weights_of_another_file_run_with_the_same_operations(tmp_path: Path) -> None:
    first = write(tmp_path / "first.pt2", Small(4))
    second = write(tmp_path / "second.pt2", Small(4))
    first_graph = ExportedGraph.load(tmp_path / "first.pt2")

    second_graph = ExportedGraph.load(tmp_path / "second.pt2", first_graph)

    assert second_graph.operations is first_graph.operations
    assert_equal(second_graph, second)
    assert_equal(first_graph, first)  # which a request may still use


def test_other_operations_are_loaded(tmp_path: Path) -> None:
    write(tmp_path / "first.pt2", Small(4))
    first_graph = ExportedGraph.load(tmp_path / "first.pt2")
    for name, module in {"wide": Small(5), "factor": Small(4, factor=3.0)}.items():
        path = tmp_path / f"{name}.pt2"
        write(path, module)

        graph = ExportedGraph.load(path, first_graph)

        assert graph.operations is not first_graph.operations
        assert_equal(graph, module)
