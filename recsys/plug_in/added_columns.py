"""Additional input columns for an existing module, which stays as it is.

A module whose first layer is linear, y = W x + b, gets inputs z beside x by a wider matrix: y =
[W, V] (x, z) + b. Here V is a parameter of its own, and V z is added to the output of the first
layer. So the module keeps its parameters and their names, and with V = 0 its outputs to the last
bit, unlike a product with one wider matrix, which adds up in another order. The first layer becomes
a `WidenedLinear`, as `print(model)` shows.

Shapes: B batch, X columns of the module's own input, Z added columns, O outputs of the first layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn


class WidenedLinear(nn.Linear):
    """A linear layer that adds `extra` [B, O] to its output while it is set."""

    extra: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, X] -> [B, O]
        """Return the layer's output plus `extra`."""
        output = super().forward(x)
        return output if self.extra is None else output + self.extra


class AddedColumns(nn.Module):
    """Input columns beside those of a module's first linear layer; their weights start at zero.

    Args:
        module: gets the columns. It is no child of this one, so its parameters are listed once.
        width: Z.

    Raises:
        ValueError: the module has no linear layer that can be widened.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        first = next((part for part in module.modules() if isinstance(part, nn.Linear)), None)
        if (
            first is None
            or type(first) not in (nn.Linear, WidenedLinear)
            or hasattr(module, "_orig_mod")
        ):
            raise ValueError(
                f"{type(module).__name__} has no linear layer that content could be added to; "
                "give a DLRM as torchrec builds it, and compile it afterwards"
            )
        first.__class__ = WidenedLinear  # the same object, so that its names stay
        self._first = (cast(WidenedLinear, first),)  # a tuple, so that it is no child of this one
        self.map = nn.Linear(width, first.out_features, bias=False)
        nn.init.zeros_(self.map.weight)

    @contextmanager
    def added(self, columns: Tensor) -> Iterator[None]:  # columns: [B, Z]
        """Add `columns` to the module's input inside the block."""
        self._first[0].extra = self.map(columns)
        try:
            yield
        finally:
            self._first[0].extra = None


class WidenedModule(nn.Module):
    """A module of one tensor, called with added columns as well: (x, z) -> its output.

    Args:
        module: the module.
        width: Z; with 0 the output is the module's own.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self._module = (module,)
        self.columns = AddedColumns(module, width) if width else None

    def forward(
        self,
        x: Tensor,  # [B, X]
        added: Tensor,  # [B, Z]
    ) -> Tensor:  # [B, ...], the module's output
        """Return the module's output for `x` beside `added`."""
        with self.columns.added(added) if self.columns is not None else nullcontext():
            output: Tensor = self._module[0](x)
        return output


def no_columns(rows: Tensor) -> Tensor:  # [B, ...] -> [B, 0]
    """Return a tensor without columns for these rows."""
    return torch.zeros(len(rows), 0, device=rows.device)
