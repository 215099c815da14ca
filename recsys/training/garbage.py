"""Fewer runs of Python's garbage collector during training.

The collector starts when 700 more objects live than at its last run. The forward of one step makes
more than that, all of which die with its graph: the collector then walks through them several times
per step and finds nothing, at about a tenth of a short step's time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

LIVING_OBJECTS = 20_000  # above what a step makes; cycles of a user's own parts still end


@contextmanager
def collected_seldom() -> Iterator[None]:
    """Start the collector less often inside the block.

    Example::

        with collected_seldom():
            for batch in batches:
                train(batch)
    """
    limits = gc.get_threshold()
    gc.set_threshold(max(limits[0], LIVING_OBJECTS) if limits[0] else 0, *limits[1:])
    try:
        yield
    finally:
        gc.set_threshold(*limits)
