"""Parse equal settings once, since jsonargparse takes tenths of a second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
NUM_RESULTS = 8  # results of a function


def cached_copy(parse: Callable[P, T]) -> Callable[P, T]:
    """Return a function of plain values that keeps its last results, and returns copies of them."""
    results: dict[str, T] = {}

    @wraps(parse)
    def wrapped(*arguments: P.args, **keywords: P.kwargs) -> T:
        key = repr((arguments, keywords))  # tells the key 1 from "1", and true from 1
        if key not in results:
            result = parse(*arguments, **keywords)
            if len(results) >= NUM_RESULTS:
                del results[next(iter(results))]
            results[key] = result
        return copy.deepcopy(results[key])

    return wrapped
