"""Every ranking backbone with and without content, several seeds each, with one budget for all.

    python -m benchmarks.backbones --data DATA --out runs/backbones

Every cell is a `recsys train` run of a recipe, `movielens_multimodal.yaml` by default, on one rank;
a finished cell is not run again. Writes the tables of medians to `benchmarks/results/backbones.md`:
AUC and GAUC of all, cold and unseen items, the gain from content in each, and the recall of the
retrieval models over the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli

from benchmarks.quality.runs import RECIPE, QualityRun, train_all
from recsys.config.ranking import keys_of

RESULTS = Path(__file__).parent / "results"
BACKBONES: dict[str, list[str]] = {
    "din_dcn": [],
    "din": [],
    "dlrm": [],
    "dlrm_dcn": [],
    "deepfm": [],
    "sim": ["--ranking.search_top_k", "10"],  # of histories of 20
    "mmoe": [],
    "hstu": [],
    "transformer": [],
    "two_tower": [],
    "two_tower, in-batch softmax": ["--ranking.loss", "in_batch_softmax"],
    "two_tower, in-batch softmax, no log Q": [
        *["--ranking.loss", "in_batch_softmax"],
        *["--ranking.log_q_correction", "false"],
    ],
    "two_tower, sampled softmax": ["--ranking.loss", "sampled_softmax"],
}
# Not every backbone has these options; without them the heads are alike.
NO_EXTRAS = {"ensemble_members": "1", "standardize_numbers": "false", "opinions": "null"}
CONTENTS = {"ID only": ["--content", "none"], "content": []}
PARTS = ("all", "cold", "unseen")
RANKING = [(metric, part) for metric in ("auc", "gauc") for part in PARTS]
RETRIEVAL = [(metric, part) for metric in ("recall@50", "ndcg@50") for part in PARTS]

Metrics = dict[str, Any]
Tests = dict[tuple[str, str], list[Metrics]]  # by backbone and content, one per seed


def backbones(
    data: str,
    out: Path,
    seeds: int = 3,
    jobs: int = 1,
    cache: Path | None = None,
    only: list[str] | None = None,
    recipe: Path = RECIPE,
    results: Path = RESULTS,
) -> None:
    """Train the grid and write the tables.

    Args:
        data: dataset; for the default recipe, MovieLens prepared from a source with posters.
        out: folder of the runs.
        seeds: runs per cell.
        jobs: how many runs train side by side, one thread each.
        cache: folder of encoded items; default: the usual one.
        only: backbones to train, by their names in the table; default: all.
        recipe: the recipe with content; the ID-only twins remove the content.
        results: folder of the tables.
    """
    names = only or list(BACKBONES)
    unknown = sorted(set(names) - set(BACKBONES))
    if unknown:
        raise ValueError(f"--only: {unknown} are unknown; choose of {list(BACKBONES)}")
    runs = {
        (name, content): [
            QualityRun(f"{name} {content}", seed, [*settings_of(name), *overrides])
            for seed in range(seeds)
        ]
        for name in names
        for content, overrides in CONTENTS.items()
    }
    # Seed by seed, so that a grid that is stopped early has some results of every cell.
    order = [of_cell[seed] for seed in range(seeds) for of_cell in runs.values()]
    done = train_all(order, data, out, recipe, jobs, cache)
    tests = {cell: [done[run] for run in of_cell] for cell, of_cell in runs.items()}
    page = _page(tests, seeds)
    results.mkdir(parents=True, exist_ok=True)
    (results / "backbones.md").write_text(page)
    print(page)


def settings_of(name: str) -> list[str]:
    """Return the settings of a row of the table on the command line."""
    model = name.split(",")[0]
    has = set(keys_of(model))
    extras = [f"--ranking.{key}={off}" for key, off in NO_EXTRAS.items() if key in has]
    return ["--ranking.name", model, *extras, *BACKBONES[name]]


def _page(tests: Tests, seeds: int) -> str:
    tables = [f"# Ranking backbones\n\nTest set, medians of {seeds} seeds.", _ranking(tests)]
    tables += [
        "What content adds: the median over seeds, and the lowest and highest.",
        _gain(tests),
    ]
    towers = {cell: of_seeds for cell, of_seeds in tests.items() if "retrieval" in of_seeds[0]}
    if towers:
        items = next(iter(towers.values()))[0]["retrieval"]["catalogue"]
        tables += [f"Retrieval among all {items:,} items, by exact search.", _retrieval(towers)]
    return "\n\n".join(tables) + "\n"


def _ranking(tests: Tests) -> str:
    rows = [
        [name, content, *_medians(of_seeds, RANKING)] for (name, content), of_seeds in tests.items()
    ]
    return _table(["backbone", "", *map(_title, RANKING)], rows)


def _retrieval(tests: Tests) -> str:
    rows = [
        [name, content, *_medians([test["retrieval"] for test in of_seeds], RETRIEVAL)]
        for (name, content), of_seeds in tests.items()
    ]
    return _table(["backbone", "", *map(_title, RETRIEVAL)], rows)


def _gain(tests: Tests) -> str:
    rows = []
    for name in dict.fromkeys(name for name, _ in tests):
        pairs = list(zip(tests[name, "content"], tests[name, "ID only"], strict=True))
        cells = [_gains([_difference(*pair, *column) for pair in pairs]) for column in RANKING]
        rows.append([name, *cells])
    return _table(["backbone", *map(_title, RANKING)], rows)


def _value(test: Metrics, metric: str, part: str) -> float | None:
    """Return a metric of a part of the items; None where the rows do not define it."""
    return test[metric] if part == "all" else test[part][metric]


def _difference(first: Metrics, second: Metrics, metric: str, part: str) -> float | None:
    values = (_value(first, metric, part), _value(second, metric, part))
    return None if None in values else values[0] - values[1]  # type: ignore[operator]


def _medians(tests: list[Metrics], columns: list[tuple[str, str]]) -> list[str]:
    return [
        _cell([_value(test, *column) for test in tests], lambda values: f"{median(values):.4f}")
        for column in columns
    ]


def _gains(values: list[float | None]) -> str:
    return _cell(
        values, lambda known: f"{median(known):+.4f} ({min(known):+.3f}, {max(known):+.3f})"
    )


def _cell(values: list[float | None], text: Callable[[list[float]], str]) -> str:
    known = [value for value in values if value is not None]
    return text(known) if known else "-"


def _title(column: tuple[str, str]) -> str:
    metric, part = column
    title = metric.replace("recall", "Recall") if "recall" in metric else metric.upper()
    return title if part == "all" else f"{title} {part}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    auto_cli(backbones, as_positional=False)
