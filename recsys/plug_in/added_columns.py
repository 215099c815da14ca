"""More input columns for a module that already exists, which stays as it is.

A module whose first layer is linear, y = W x + b, gets inputs z beside x by a wider matrix: y =
[W, V] (x, z) + b. Here V is a parameter of its own, and V z is added to what the first layer gives:
the module keeps its parameters and their names, and with V = 0 its outputs to the last bit, which
the product with one wider matrix would not (it adds up in another order). The first layer becomes
a `WidenedLinear`, as `print(model)` shows.

Shapes: B batch, Z added columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn


class WidenedLinear(nn.Linear):
    """A linear layer that adds `extra` [B, D] to its output while there is one."""

    extra: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, D]
        output = super().forward(x)
        return output if self.extra is None else output + self.extra


class AddedColumns(nn.Module):
    """Input columns beside those of a module's first linear layer; their weights start at zero.

    Args:
        module: what gets them. It is no child of this one: its parameters are not listed twice.
        width: Z.

    Raises:
        ValueError: the module has no linear layer that could be widened.

    Example::

        import torch
        from recsys.plug_in.added_columns import AddedColumns

        mlp = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        columns = AddedColumns(mlp, width=2)
        x, z = torch.randn(5, 4), torch.randn(5, 2)
        with columns.added(z):
            assert torch.equal(mlp(x), mlp(x))  # zero weights change nothing yet
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
                f"{type(module).__name__} has no linear layer to which content could be added; "
                "give the DLRM as its class makes it, and compile it afterwards"
            )
        first.__class__ = WidenedLinear  # the very same layer, so that its names stay
        self._first = (cast(WidenedLinear, first),)  # in a tuple, so that it is no child of this
        self.map = nn.Linear(width, first.out_features, bias=False)
        nn.init.zeros_(self.map.weight)

    @contextmanager
    def added(self, columns: Tensor) -> Iterator[None]:  # [B, Z]
        """Show the module `columns` beside its own input while this lasts."""
        self._first[0].extra = self.map(columns)
        try:
            yield
        finally:
            self._first[0].extra = None


class WidenedModule(nn.Module):
    """`AddedColumns` of a module that is called with one tensor: (x, z) -> its output.

    With no columns to add it is the module.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self._module = (module,)
        self.columns = AddedColumns(module, width) if width else None

    def forward(
        self,
        x: Tensor,
        added: Tensor,  # [B, Z]
    ) -> Tensor:
        with self.columns.added(added) if self.columns is not None else nullcontext():
            output: Tensor = self._module[0](x)
        return output


def no_columns(rows: Tensor) -> Tensor:
    """Return no columns beside rows [B, ...]: [B, 0]."""
    return torch.zeros(len(rows), 0, device=rows.device)
