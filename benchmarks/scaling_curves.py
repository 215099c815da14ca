"""The curves of the scaling benchmark: setting A with one size changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.settings import setting
from benchmarks.timing.steps import Variant

RANKS = (1, 2)
TABLE_ROWS = (100_000, 1_000_000, 10_000_000, 50_000_000)
HISTORIES = (50, 10, 200, 1000)  # the others are compared with the first
BATCH_SIZES = (64, 256, 512, 1024, 2048)
# Few items make few unique ones; drawn evenly, most items of a batch are different ones.
DRAWS: tuple[dict[str, Any], ...] = (
    {"num_items": 1_000},
    {"num_items": 10_000},
    {"num_items": 100_000},
    {"num_items": 100_000, "uniform": True},
)
QUICK_DRAWS: tuple[dict[str, Any], ...] = ({"num_items": 20}, {"num_items": 60, "uniform": True})
FULL = ("--content.history.mode", "full")
ROWS_OF_DATA = 16_384  # enough for the loaded batches of the largest size


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a name; `variant_at` writes the data it needs."""

    name: str
    x_name: str
    xs: Sequence[float]
    variant_at: Callable[[int], Variant]  # by index in `xs`

    def points(self) -> Iterator[tuple[float, Variant]]:
        """Yield each x with its variant."""
        for place, x in enumerate(self.xs):
            yield x, self.variant_at(place)


class _Variants:
    """Makes variants of setting A with some sizes of the data changed."""

    def __init__(self, out: Path, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.setting = setting("A", quick)
        if not quick:
            self.setting = self.setting.with_data(num_rows=ROWS_OF_DATA)

    def __call__(
        self, name: str, *overrides: str, ranks: int = 1, apart: bool = False, **sizes: Any
    ) -> Variant:
        sized = self.setting.with_data(**sizes)
        data, words = sized.prepared(self.out)
        recipe = str(sized.recipe)
        words = (*words, *overrides)
        return Variant(name, recipe, data, words, ranks=ranks, apart=apart, loaded_batches=8)


def curves_of(
    out: Path, quick: bool, ranks: list[int] | None, table_rows: list[int] | None
) -> list[Curve]:
    """Return all curves."""
    make = _Variants(out, quick)
    rank_counts = ranks or list(RANKS)
    rows = table_rows or list((50, 100) if quick else TABLE_ROWS)
    histories = (2, 6) if quick else HISTORIES
    sizes = (8, 16) if quick else BATCH_SIZES
    draws = QUICK_DRAWS if quick else DRAWS
    top_k = ("--content.history.top_k", "2" if quick else "50")

    def at_ranks(apart: bool) -> Callable[[int], Variant]:
        def at(place: int) -> Variant:
            count = rank_counts[place]
            return make(f"{count} ranks", ranks=count, apart=apart)

        return at

    def at_rows(place: int) -> Variant:
        no_content = {"text_dim": 0, "image_dim": 0}
        count = rows[place]
        return make(f"{count} rows", "--content", "none", num_users=count, **no_content)

    def at_history(*words: str) -> Callable[[int], Variant]:
        return lambda place: make(f"history {histories[place]}", *words, history=histories[place])

    def at_size(place: int) -> Variant:
        return make(f"batch {sizes[place]}", "--batch_size", str(sizes[place]))

    def at_draw(*words: str) -> Callable[[int], Variant]:
        return lambda place: make(f"items drawn {place}", *words, **draws[place])

    places = list(range(len(draws)))
    return [
        Curve("ranks", "ranks", rank_counts, at_ranks(apart=False)),
        Curve("ranks, apart", "ranks", rank_counts, at_ranks(apart=True)),
        Curve("table rows, ID only", "rows of the user table", rows, at_rows),
        Curve("history", "items in each history", histories, at_history()),
        Curve("history, top_k", "items in each history", histories, at_history(*top_k)),
        Curve("batch size", "batch size", sizes, at_size),
        Curve("unique items", "unique / history", places, at_draw()),
        Curve("unique items, full", "unique / history", places, at_draw(*FULL)),
    ]
