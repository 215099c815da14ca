"""Wraps a module's `forward` in place, visibly in `print`, by a subclass as `fully_shard` does.

A model is wrapped from the inside out: `AtCut`, peft's adapters, `Recomputed`, `InBfloat16` or
`InFloat32`, `Compiled` or `AsRows`, and `DistributedModelParallel`. Names in checkpoints stay.
"""

import functools
from typing import Any

from torch import nn


@functools.cache
def _wrapped_class(wrapper: Any, base: Any) -> Any:
    return type(base)(f"{wrapper.__name__}{base.__name__}", (wrapper, base), {})


def wrap(module: nn.Module, wrapper: type[nn.Module]) -> None:
    """Put `wrapper`, which has no `__init__`, in front of the module's class."""
    assert not isinstance(module, wrapper), f"wrapped in {wrapper.__name__} already"
    module.__class__ = _wrapped_class(wrapper, type(module))  # type: ignore[arg-type]


def unwrap(module: nn.Module, wrapper: type[nn.Module]) -> None:
    """Remove the outermost wrapper, which must be `wrapper`."""
    outer, base = type(module).__bases__
    assert outer is wrapper, f"{type(module).__name__} is not wrapped in {wrapper.__name__}"
    module.__class__ = base
