"""Shows items and their nearest items by content and ID vector, with names and pictures.

Shapes: I items, K neighbours, N rows of the test split, E examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from recsys.build import Job
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.item_table import ItemTable
from recsys.diagnostics.run_report.item_columns import column_values
from recsys.diagnostics.run_report.item_descriptions import category_text, item_names, item_pictures
from recsys.diagnostics.run_report.item_vectors import ItemVectors, item_vectors
from recsys.diagnostics.run_report.neighbours import nearest
from recsys.diagnostics.run_report.page import Card, Cards, Section

TITLE = "Examples of nearest items"
OF_EACH_KIND = 2
SHOWN = 5


@dataclass(frozen=True)
class Examples:
    """The items shown, by popularity in training; int64 [at most `OF_EACH_KIND`] each."""

    frequent: np.ndarray
    middling: np.ndarray
    unseen: np.ndarray


def example_items(
    item_counts: ItemCounts,
    test_items: np.ndarray,  # int64 [N]
    candidates: np.ndarray,  # int64 [I]
) -> Examples:
    """Choose the items shown, deterministically.

    Middling items are those at which the cumulated impressions of more frequent items reach half of
    the total. Unseen items are sorted by their number of rows in the test split, highest first.
    """
    candidates = np.sort(candidates)
    counts = item_counts.of(candidates)
    by_count = np.argsort(-counts, kind="stable")
    seen = candidates[by_count[: int((counts > 0).sum())]]
    frequent, others = seen[:OF_EACH_KIND], seen[OF_EACH_KIND:]
    middle = int(np.searchsorted(item_counts.of(seen).cumsum(), counts.sum() / 2)) - OF_EACH_KIND
    middle = max(0, min(middle, len(others) - OF_EACH_KIND))
    unseen = candidates[counts == 0]
    tested = ItemCounts.of_rows(test_items).of(unseen)
    unseen = unseen[np.argsort(-tested, kind="stable")]
    return Examples(frequent, others[middle : middle + OF_EACH_KIND], unseen[:OF_EACH_KIND])


def nearest_items(
    job: Job,
    run: Path,
    pool: ItemVectors,
    examples: Examples,
    item_counts: ItemCounts,
    table: ItemTable | None,
    category: str | None,
) -> Section:
    """Return the section with the examples and their nearest items of `pool`.

    The model of the job encodes the examples; the run's checkpoint has their ID vectors. Without a
    table of the items' files, items are named by their row in the ID table. Cards show the column
    `category`, if any.
    """
    if len(pool.items) < 2:
        return Section(TITLE, ["Too few items have training impressions for neighbours."])
    unseen = examples.unseen if pool.content is not None else examples.unseen[:0]
    shown = np.concatenate([examples.frequent, examples.middling, unseen])
    found = _neighbours(pool, item_vectors(job, run, shown))
    items = np.unique(np.concatenate([shown, *(near.ravel() for near, _ in found.values())]))
    card = _cards_of(items, item_counts, table, category)
    cards = []
    for place, (item, count) in enumerate(zip(shown.tolist(), item_counts.of(shown).tolist())):
        rows = [
            (
                f"nearest by {kind} vector",
                [*map(card, near[place].tolist(), cosines[place].tolist())],
            )
            for kind, (near, cosines) in found.items()
            if kind != "ID" or count
        ]
        if not count:
            rows.append(("The ID vector is untrained: the item is in no row of training.", []))
        cards.append(Cards(card(item, None), rows))
    words = (
        "Frequent items first, then items of middling popularity: the more frequent ones have half "
        "of all training impressions. "
    )
    if len(unseen):
        words += "Last are those unseen in training that the test split ranks most often. "
    words += (
        f"Neighbours are nearest by cosine among the {len(pool.items):,} items seen most in "
        "training; impressions are those of training."
    )
    return Section(TITLE, [words], cards=cards)


def _neighbours(
    pool: ItemVectors, examples: ItemVectors
) -> dict[str, tuple[np.ndarray, Tensor]]:  # [E, K] each
    """Return the items nearest to each example, nearest first, and cosines, by kind of vector."""
    place_of = {item: place for place, item in enumerate(pool.items.tolist())}
    own = np.array([place_of.get(item, -1) for item in examples.items.tolist()])
    by_kind = {}
    for kind, queries, vectors in (
        ("content", examples.content, pool.content),
        ("ID", examples.ids, pool.ids),
    ):
        if queries is not None and vectors is not None:
            cosines, places = nearest(queries, vectors, own, SHOWN)
            by_kind[kind] = pool.items[places.numpy()], cosines
    return by_kind


def _cards_of(
    items: np.ndarray,  # int64 [I]
    item_counts: ItemCounts,
    table: ItemTable | None,
    category: str | None,
) -> Callable[[int, float | None], Card]:
    """Return a function that makes the card of one of these items; each item is read once."""
    names = dict(zip(items.tolist(), item_names(table, items)))
    pictures = dict(zip(items.tolist(), item_pictures(table, items)))
    counts = dict(zip(items.tolist(), item_counts.of(items).tolist()))
    kinds: dict[int, str] = {}
    if table is not None and category is not None:
        values = column_values(table, category, items)
        kinds = {item: category_text(value) for item, value in zip(items.tolist(), values)}

    def card(item: int, cosine: float | None) -> Card:
        count = counts[item]
        lines = [f"cosine {cosine:.3f}"] if cosine is not None else []
        lines += [kinds[item]] if kinds.get(item) else []
        lines.append(f"{count:,} impression{'' if count == 1 else 's'}")
        return Card(names[item], lines, pictures[item])

    return card
