"""Ranking quality of a grid of configurations, several seeds each, with one budget for all.

    python -m benchmarks.quality --data DATA --out runs/quality

Every cell is a `recsys train` run of `movielens_multimodal.yaml` with the overrides below, on one
rank; a finished cell is not run again. Writes the table of medians to
`benchmarks/results/quality.md`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli

RECIPES = Path(__file__).parent.parent / "recsys" / "configs"
RESULT = Path(__file__).parent / "results" / "quality.md"
BUDGET = ["--batch_size", "512", "--epochs", "3", "--validations_per_epoch", "2", "--patience", "3"]
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


def quality(data: str, out: Path, seeds: int = 3, lora_seeds: int = 0) -> None:
    """Trains the grid and writes the table.

    Args:
        data: a dataset made by `recsys prepare movielens` from a source with posters.
        out: folder of the runs.
        seeds: runs per configuration.
        lora_seeds: runs with LoRA in the top layer of the text encoder, which are slower.
    """
    cells = {name: (overrides, seeds) for name, overrides in GRID.items()}
    if lora_seeds:
        cells["FQ-Former + CIC, LoRA in the text encoder"] = (LORA, lora_seeds)
    rows = []
    for name, (overrides, runs) in cells.items():
        tests = [_run(name, overrides, data, out, seed) for seed in range(runs)]
        rows.append((name, runs, [median(values) for values in zip(*tests, strict=True)]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(_table(rows))
    print(RESULT.read_text())


def _run(name: str, overrides: list[str], data: str, out: Path, seed: int) -> list[float]:
    folder = out / f"{name.lower().replace(' ', '_').replace(',', '')}-{seed}"
    if not (folder / "metrics.json").exists():
        command = [sys.executable, "-m", "recsys.cli", "train"]
        command += ["--config", str(RECIPES / "movielens_multimodal.yaml"), "--data", data]
        command += ["--out", str(folder), "--overwrite", "true", "--seed", str(seed)]
        subprocess.run([*command, *BUDGET, *overrides], check=True, stdout=subprocess.DEVNULL)
    test: dict[str, Any] = json.loads((folder / "metrics.json").read_text())["test"]
    return [test["auc"], test["gauc"], test["cold"]["gauc"], test["unseen"]["gauc"]]


def _table(rows: list[tuple[str, int, list[float]]]) -> str:
    lines = [f"| test set, median | seeds | {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    for name, runs, values in rows:
        lines.append(f"| {name} | {runs} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    auto_cli(quality, as_positional=False)
