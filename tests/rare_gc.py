"""Python's garbage collector starts seldom: it took a fifth of the tests' processor time."""

import gc

THRESHOLDS = (50_000, 10, 10)


def collect_garbage_seldom() -> None:
    """What is there now, mostly modules, is no garbage, and not looked at again.

    A process that is forked has the same limits, and does not copy the pages of these objects.
    """
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    gc.enable()
