"""A transformers model cut in two between its layers: what lies below is frozen and run once.

The model's own `forward` runs both halves, so its masks, position biases and last norms are its
own, whatever they are. Going up to the cut, it is stopped there and its hidden states are taken;
going on from the cut, the embeddings and the layers below hand on those hidden states instead of
computing. Not every model works that way (a later layer may look at the embeddings once more), so
`find_split` tries it and compares.

Shapes: U unique items, T tokens, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from recsys.content.wrap import unwrap, wrap


def find_layers(model: Any) -> list[nn.Module]:
    """The layers of a model from the lowest to the highest, whatever it calls them.

    Where it has no one stack of `num_hidden_layers`, the members of all innermost lists.
    """
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
    count = getattr(model.config, "num_hidden_layers", None)
    for stack in lists:
        if len(stack) == count:
            return list(stack)
    inner = [
        stack
        for stack in lists
        if not any(isinstance(part, nn.ModuleList) for part in list(stack.modules())[1:])
    ]
    return [layer for stack in inner for layer in stack]


def find_entry(model: Any) -> nn.Module | None:
    """The module that makes hidden states of ids or pixels; None where that is unknown."""
    if isinstance(getattr(model, "embeddings", None), nn.Module):
        return model.embeddings
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


class _Reached(Exception):
    """Ends a run of the model at the cut."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class AtCut(nn.Module):
    """Wraps the embeddings and each layer below a cut, for its `LayerSplit`.

    Going up, the last of them ends the run; going on from the cut, each hands on hidden states.
    """

    cut: LayerSplit
    cut_is_here: bool  # this is the last one
    rest: tuple[None, ...] | None  # what it returns beside hidden states
    width: int  # of its hidden states

    def forward(self, *arguments: Any, **named: Any) -> Any:
        given = self.cut.given
        if given is not None:
            if given.shape[-1] != self.width:  # embeddings narrower than layers
                given = given.new_zeros(*given.shape[:-1], self.width)
            return given if self.rest is None else (given, *self.rest)
        output = super().forward(*arguments, **named)
        if isinstance(output, tuple):
            self.rest = (None,) * (len(output) - 1)
        hidden = output if self.rest is None else output[0]
        self.width = hidden.shape[-1]
        if self.cut_is_here and self.cut.stops:
            raise _Reached(hidden)
        return output


class LayerSplit:
    """The cut above the last of `below`.

    Args:
        model: the whole model.
        entry: its embeddings.
        below: its frozen layers, from the lowest on; none: the cut is behind the embeddings.

    Example::

        split = LayerSplit(bert, bert.embeddings, bert.encoder.layer[:2])
        hidden = split.below(lambda: bert(input_ids=ids))
        split.above(hidden, lambda: bert(input_ids=ids)).last_hidden_state  # as bert alone gives
    """

    def __init__(self, model: nn.Module, entry: nn.Module, below: Sequence[nn.Module]) -> None:
        self.model = model
        self.parts: list[Any] = [entry, *below]
        self.given: Tensor | None = None
        self.stops = False
        for part in self.parts:
            wrap(part, AtCut)
            part.cut, part.cut_is_here = self, part is self.parts[-1]
            part.rest, part.width = None, 0

    def below(self, run: Callable[[], Any]) -> Tensor:  # [U, T, D]
        """The hidden states at the cut when `run` runs the model."""
        self.stops = True
        try:
            run()
        except _Reached as reached:
            return reached.hidden
        finally:
            self.stops = False
        raise RuntimeError(f"{type(self.model).__name__} did not reach the layer it is cut at")

    def above(
        self,
        hidden: Tensor,  # [U, T, D]
        run: Callable[[], Any],
    ) -> Any:
        """Returns the output of `run` when the model goes on from these hidden states."""
        self.given = hidden
        try:
            return run()
        finally:
            self.given = None

    def drop(self) -> None:
        """Frees the weights below the cut; names of parameters stay, their sizes become 0."""
        inside = {id(value) for part in self.parts for value in part.parameters()}
        outside = {id(part) for top in self.parts for part in top.modules()}
        shared = {
            id(value)
            for part in self.model.modules()
            if id(part) not in outside
            for value in part.parameters(recurse=False)
        }
        for value in self.model.parameters():
            if id(value) in inside - shared:
                value.data = value.data.new_empty(0)

    def remove(self) -> None:
        """Leaves the model as it was."""
        for part in self.parts:
            unwrap(part, AtCut)


def find_split(
    model: nn.Module,
    below: Sequence[nn.Module],
    run: Callable[[], Tensor],
    run_from_cut: Callable[[Tensor], Tensor],
) -> tuple[LayerSplit | None, str]:
    """The cut above `below`, if the model gives the same through it.

    Args:
        model: in eval mode.
        below: its frozen layers.
        run: the tokens that the model gives for some input.
        run_from_cut: the same from hidden states at the cut, to be called within `above`.

    Returns:
        the split and "", or None and why there is none.
    """
    entry = find_entry(model)
    if entry is None:
        return None, "its embeddings cannot be distinguished from its layers"
    split = LayerSplit(model, entry, below)
    try:
        wanted = run()
        hidden = split.below(run)
        if hidden.dim() != 3:
            raise ValueError(f"hidden states of shape {list(hidden.shape)}")
        found = split.above(hidden, lambda: run_from_cut(hidden))
        if found.is_meta:  # without numbers shapes are all there is to compare
            return split, ""
        difference = float((found - wanted).abs().max())
        if difference < 1e-3:
            return split, ""
        cause = f"its hidden states come out wrong by {difference:.1e}"
    # A model that works otherwise fails in whatever way it does.
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
    split.remove()
    return None, cause
