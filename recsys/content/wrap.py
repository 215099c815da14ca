"""Wraps a module's `forward` in place, visibly in `print`.

The module's class becomes a subclass of itself with a wrapper in front, as in torch's
`fully_shard`: parameters, names in checkpoints, hooks and `isinstance` stay as they are. A model is
wrapped from the inside out:

1. `layer_split.AtCut`: the frozen layers below the cut of an encoder, as it is built;
2. peft's adapters, which replace linear maps inside the trained layers;
3. `transformer.Recomputed`: trained layers, with `activation_checkpointing`;
4. `recsys.model.precision.InBfloat16`: encoders, projections, fusion, ranking model, and the
   history map, which on CPU gets `InFloat32`;
5. `recsys.model.compilation.Compiled`: fusion, trained layers, stacks of the ranking model;
6. `DistributedModelParallel`, around the whole model.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def _wrapped_class(wrapper: Any, base: Any) -> Any:
    return type(base)(f"{wrapper.__name__}{base.__name__}", (wrapper, base), {})


def wrap(module: nn.Module, wrapper: type[nn.Module]) -> None:
    """Put `wrapper` in front of the module's class.

    `wrapper.forward(*arguments, **keywords)` may call `super().forward`; it has no `__init__`.
    """
    assert not isinstance(module, wrapper), f"wrapped in {wrapper.__name__} already"
    module.__class__ = _wrapped_class(wrapper, type(module))  # type: ignore[arg-type]


def unwrap(module: nn.Module, wrapper: type[nn.Module]) -> None:
    """Remove the outermost wrapper, which must be `wrapper`."""
    outer, base = type(module).__bases__
    assert outer is wrapper, f"{type(module).__name__} is not wrapped in {wrapper.__name__}"
    module.__class__ = base
