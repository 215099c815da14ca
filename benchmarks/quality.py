"""Ranking quality of a grid of configurations, several seeds each, with one budget for all.

    python -m benchmarks.quality --data DATA --out runs/quality

Every cell is a `recsys train` run of `movielens_multimodal.yaml` with the overrides below, on one
rank; a finished cell is not run again. Writes the table of medians to
`benchmarks/results/quality.md`.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli

from benchmarks.quality_runs import QualityRun, train_all

RESULT = Path(__file__).parent / "results" / "quality.md"
LORA = ["--content.modalities.text.training", "lora"]
NO_CIC = ["--contrastive.weight", "0"]
CONCAT = ["--content.fusion.name", "concat"]
NO_SIMILARITY = ["--content.history.similarity_features", "false"]
GRID: dict[str, list[str]] = {
    "ID only": ["--content", "none"],
    "ConcatFusion": [*CONCAT, *NO_CIC],
    "ConcatFusion + CIC": CONCAT,
    "FQ-Former": NO_CIC,
    "FQ-Former + CIC": [],
    "FQ-Former + CIC, no similarity features": NO_SIMILARITY,
}
COLUMNS = ("AUC", "GAUC", "GAUC cold", "GAUC unseen")


def quality(
    data: str,
    out: Path,
    seeds: int = 3,
    lora_seeds: int = 0,
    jobs: int = 1,
    cache: Path | None = None,
) -> None:
    """Trains the grid and writes the table.

    Args:
        data: a dataset made by `recsys prepare movielens` from a source with posters.
        out: folder of the runs.
        seeds: runs per configuration.
        lora_seeds: runs with LoRA in the top layer of the text encoder, which are slower.
        jobs: how many train side by side.
        cache: folder of encoded items; default: the usual one.
    """
    cells = {name: (overrides, seeds) for name, overrides in GRID.items()}
    if lora_seeds:
        cells["FQ-Former + CIC, LoRA in the text encoder"] = (LORA, lora_seeds)
    runs = {
        name: [QualityRun(name, seed, overrides) for seed in range(count)]
        for name, (overrides, count) in cells.items()
    }
    everything = [run for of_cell in runs.values() for run in of_cell]
    tests = train_all(everything, data, out, jobs=jobs, cache=cache)
    rows = []
    for name, of_cell in runs.items():
        values = zip(*(_values(tests[run]) for run in of_cell), strict=True)
        rows.append((name, len(of_cell), [median(column) for column in values]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(_table(rows))
    print(RESULT.read_text())


def _values(test: dict[str, Any]) -> list[float]:
    return [test["auc"], test["gauc"], test["cold"]["gauc"], test["unseen"]["gauc"]]


def _table(rows: list[tuple[str, int, list[float]]]) -> str:
    lines = [f"| test set, median | seeds | {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    for name, runs, values in rows:
        lines.append(f"| {name} | {runs} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(quality, as_positional=False)
