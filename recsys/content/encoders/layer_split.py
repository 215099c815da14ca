"""Cuts a transformers model in two between its layers: frozen layers below run once per item.

Shapes: U unique items, T tokens, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from recsys.content.wrap import unwrap, wrap


def find_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a model from the lowest to the highest, whatever their names."""
    lists = [stack for stack in model.modules() if isinstance(stack, nn.ModuleList) and len(stack)]
    count = getattr(model.config, "num_hidden_layers", None)
    for stack in lists:
        if len(stack) == count:
            return list(stack)
    inner = [
        stack
        for stack in lists
        if not any(isinstance(module, nn.ModuleList) for module in list(stack.modules())[1:])
    ]
    return [layer for stack in inner for layer in stack]


def find_entry(model: Any) -> nn.Module | None:
    """Return the module that maps ids or pixels to hidden states; None if that is unknown."""
    if isinstance(getattr(model, "embeddings", None), nn.Module):
        return model.embeddings
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


class _CutReached(Exception):
    """Raised to end a run of the model at the cut."""

    def __init__(self, hidden: Tensor) -> None:  # [U, T, D]
        self.hidden = hidden


class AtCut(nn.Module):
    """Wrapper of the embeddings and each layer below a cut: ends the run, or returns states."""

    cut: LayerSplit
    is_last_below: bool  # whether this is the last module below the cut
    extras: tuple[None, ...] | None  # after its states; None if it returns a tensor
    width: int  # D of its hidden states

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden_states = self.cut.injected
        if hidden_states is not None:
            if hidden_states.shape[-1] != self.width:  # embeddings narrower than layers
                hidden_states = hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)
            return hidden_states if self.extras is None else (hidden_states, *self.extras)
        output = super().forward(*arguments, **keywords)
        if isinstance(output, tuple):
            self.extras = (None,) * (len(output) - 1)
        hidden = output if self.extras is None else output[0]
        self.width = hidden.shape[-1]
        if self.is_last_below and self.cut.stops:
            raise _CutReached(hidden)
        return output


class LayerSplit:
    """Cut of `model` above the last of `lower`; without any, after its `entry`."""

    def __init__(self, model: nn.Module, entry: nn.Module, lower: Sequence[nn.Module]) -> None:
        self.model = model
        self.modules: list[Any] = [entry, *lower]
        self.injected: Tensor | None = None
        self.stops = False
        for module in self.modules:
            wrap(module, AtCut)
            module.cut, module.is_last_below = self, module is self.modules[-1]
            module.extras, module.width = None, 0

    def run_below(self, run: Callable[[], Any]) -> Tensor:  # [U, T, D]
        self.stops = True
        try:
            run()
        except _CutReached as reached:
            return reached.hidden
        finally:
            self.stops = False
        raise RuntimeError(f"{type(self.model).__name__} did not reach the layer it is cut at")

    def run_above(self, hidden: Tensor, run: Callable[[], Any]) -> Any:  # [U, T, D]
        self.injected = hidden
        try:
            return run()
        finally:
            self.injected = None

    def drop(self) -> None:
        """Free the weights below the cut; names of parameters stay, their sizes become 0."""
        lower_ids = {id(module) for top in self.modules for module in top.modules()}
        upper = [module for module in self.model.modules() if id(module) not in lower_ids]
        shared = {id(value) for module in upper for value in module.parameters(recurse=False)}
        for value in (value for module in self.modules for value in module.parameters()):
            if id(value) not in shared:
                value.data = value.data.new_empty(0)

    def remove(self) -> None:
        for module in self.modules:
            unwrap(module, AtCut)


def find_split(
    model: nn.Module,
    lower: Sequence[nn.Module],
    run: Callable[[], Tensor],
    run_from_cut: Callable[[Tensor], Tensor],
) -> tuple[LayerSplit | None, str]:
    """Return a cut above `lower`, or None and the reason why outputs differ or it fails.

    `run` returns tokens [U, T, D] of a sample, `run_from_cut` those from hidden states.
    """
    entry = find_entry(model)
    if entry is None:
        return None, "its embeddings cannot be distinguished from its layers"
    split = LayerSplit(model, entry, lower)
    try:
        expected = run()
        hidden = split.run_below(run)
        if hidden.dim() != 3:
            raise ValueError(f"hidden states of shape {list(hidden.shape)}")
        actual = split.run_above(hidden, lambda: run_from_cut(hidden))
        if actual.is_meta:  # on meta only shapes can be compared
            return split, ""
        difference = float((actual - expected).abs().max())
        if difference < 1e-3:
            return split, ""
        cause = f"its hidden states come out wrong by {difference:.1e}"
    # A model that cannot be cut may raise any exception.
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
    split.remove()
    return None, cause
