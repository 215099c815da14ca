"""Detect content that is equal for most items and so cannot distinguish them.

Shapes: U unique items, T entries of the longest of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recsys.data.items.content_input import ContentInput

MOST = 0.5  # share of the items from which on equal content is reported


def digests_of(content: ContentInput) -> list[bytes]:  # values [U, T, ...], mask [U, T]
    """Return a hash of each item's entries; items without any are left out."""
    rows = zip(content.values, content.mask, strict=True)
    entries = (values[mask].numpy().tobytes() for values, mask in rows if mask.any())
    return [hashlib.blake2b(entry, digest_size=8).digest() for entry in entries]


def share_of_most_common(values: Sequence[Hashable]) -> float:
    """Return the share of the values that equal the most frequent one; 0 without values."""
    ((_, count),) = Counter(values).most_common(1) or [(None, 0)]
    return count / max(len(values), 1)


def is_mostly_equal(share: float, num_items: int) -> bool:
    """Return whether a share of equal content among some items is to be reported."""
    return num_items > 1 and share > MOST


def shared_beginning(texts: Sequence[str]) -> int:
    """Return the number of characters with which more than `MOST` of the texts begin alike."""
    ordered = sorted(texts)
    distance = int(MOST * len(ordered))  # texts between the first and the last of such a majority
    if not distance:
        return 0
    return max(len(commonprefix(pair)) for pair in zip(ordered, ordered[distance:]))  # noqa: RUF071
