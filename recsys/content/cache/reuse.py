"""Reuses outputs of earlier caches of the same frozen layers, matched by item content.

A cache is named by all of its content, so a few changed items of a catalogue give it another name;
but only the changed items need the encoder. Each cache keeps a hash per item for this.

Shapes: n rows to reuse, N rows of the new cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys.data.items.ragged_array import RaggedArray
from recsys.data.items.row_hashes import HASHES

ABOUT = "about.json"


@dataclass
class EarlierCache:
    """A finished cache that holds some rows of the new one.

    rows: [n], rows of the new cache; places: [n], rows of the earlier one with the same content.
    """

    folder: Path
    rows: np.ndarray
    places: np.ndarray


def caches_of(cache: Path, encoder_key: str) -> list[str]:
    """Return the names of the usable caches of an encoder, the newest first."""
    found = []
    for about in cache.glob(f"frozen-*/{ABOUT}"):
        try:
            if json.loads(about.read_text())["encoder_key"] == encoder_key:
                hashes = np.load(about.parent / HASHES, allow_pickle=False)
                if len(hashes) == len(RaggedArray(about.parent)) > 0:
                    found.append((about.stat().st_mtime_ns, about.parent.name))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or being removed: encoding again is always correct
    return [name for _, name in sorted(found, reverse=True)]


def find_in(
    cache: Path,
    names: list[str],
    hashes: np.ndarray,  # [N]
    missing: np.ndarray,  # [n]
) -> list[EarlierCache]:
    """Return which of the missing rows earlier caches hold; each row at most once."""
    found = []
    for name in names:
        known = np.load(cache / name / HASHES, allow_pickle=False)
        order = np.argsort(known, kind="stable")
        place = np.searchsorted(known, hashes[missing], sorter=order).clip(max=len(known) - 1)
        same = known[order[place]] == hashes[missing]
        if same.any():
            found.append(EarlierCache(cache / name, missing[same], order[place[same]]))
        missing = missing[~same]
    return found
