"""Measure the AUC of packages of the same runs, by type of tables and precision of products.

    python -m benchmarks.serving.accuracy --runs '[runs/movielens]' --out packages/accuracy

The package scores every test row as a request. Exits with 1 if fp16, int8 or products in bfloat16
lose too much, or fp32 differs from `recsys predict`. Existing packages are used as they are.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, write_result
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.metrics import grouped_auc
from recsys.evaluation.predict import predict
from recsys.serving import Scorer
from recsys.serving.export import export_run
from recsys.serving.package import PackagePrecision
from recsys.serving.requests import request_columns
from recsys.serving.vector_file import StoredType
from recsys.storage.location import Location

MAX_LOST = {"fp16": 0.0005, "int8": 0.001, "bf16": 0.0005}
MAX_DIFFERENCE = 1e-6  # of fp32 from `recsys predict`
# Options of an export by name: type of the tables, and precision.
PACKAGES: dict[str, tuple[StoredType, PackagePrecision]] = {
    **{stored_as: (stored_as, "run") for stored_as in get_args(StoredType)},
    "bf16": ("fp32", "bf16"),
}


def accuracy(
    out: Path,
    runs: list[Path],
    rows: int = 0,
    results: Path = RESULTS,
) -> bool:
    """Export and score every run; return whether the aims are reached.

    Args:
        out: folder of the packages and predictions.
        runs: folders of finished runs.
        rows: test rows to score; 0: all.
        results: folder for the figures.
    """
    records = [_measure(run, out / run.name, rows) for run in runs]
    write_result(_result(records), results)
    return all(record["passes"] for record in records)


def _measure(run: Path, out: Path, rows: int) -> dict[str, Any]:
    test = (Location.of((run / "data.txt").read_text().strip()) / "test").files(".parquet")
    with joined_ranks("cpu") as ranks:
        if not (predicted := out / "predictions.parquet").exists():
            out.mkdir(parents=True, exist_ok=True)
            predict(run, [str(file) for file in test], predicted, None, ranks, "cpu")
        for name, (stored_as, precision) in PACKAGES.items():
            if not (out / name).exists():
                export_run(run, out / name, stored_as, ranks, precision=precision)
    table = pq.read_table(predicted).slice(0, rows or None)
    aucs, megabytes = {}, {}
    for name in PACKAGES:
        scorer = Scorer.load(out / name)
        label = scorer.labels[0]
        scores = np.array([scorer.score(**request)[0, 0] for request in _requests(scorer, table)])
        if name == "fp32":
            expected = table[f"prediction_{label}"].to_numpy()
            difference, ranking = float(np.abs(scores - expected).max()), scorer.manifest.ranking
        positive = table[label].to_numpy() > 0.5
        aucs[name] = float(grouped_auc(positive, scores, np.zeros(len(scores)))[1][0])
        files = scorer.manifest.files.values()
        megabytes[name] = sum(file["bytes"] for file in files) / 1e6
    lost = {name: aucs["fp32"] - aucs[name] for name in PACKAGES}
    is_accurate = all(lost[name] <= limit for name, limit in MAX_LOST.items())
    return {
        "benchmark": "package_accuracy",
        "run": run.name,
        "ranking": ranking,
        "rows": table.num_rows,
        "auc": aucs,
        "lost": lost,
        "megabytes": megabytes,
        "difference": difference,
        "passes": is_accurate and difference <= MAX_DIFFERENCE,
    }


def _requests(scorer: Scorer, table: pa.Table) -> Iterator[dict[str, Any]]:
    manifest, schema = scorer.manifest, scorer.schema
    user, history = request_columns(schema, manifest.pooled, manifest.dense)
    columns = list(dict.fromkeys([*user, *history, schema.target_item]))
    for batch in table.select(columns).to_batches(1024):
        for row in batch.to_pylist():
            yield {
                "user": {name: row[name] for name in user},
                "history": {name: row[name] for name in history},
                "candidates": [row[schema.target_item]],
            }


def _result(records: list[dict[str, Any]]) -> Result:
    names = [name for name in PACKAGES if name != "fp32"]
    columns = [
        "run",
        "fp32 - predict",
        "AUC fp32",
        *(f"lost by {name}" for name in names),
        "",
    ]
    rows = [
        [
            f"{record['run']} ({record['ranking']})",
            f"{record['difference']:.1e}",
            f"{record['auc']['fp32']:.5f}",
            *(f"{record['lost'][name]:+.5f}" for name in names),
            "reached" if record["passes"] else "missed",
        ]
        for record in records
    ]
    limits = ", ".join(f"{name} {limit:g}" for name, limit in MAX_LOST.items())
    reading = [
        f"{records[0]['rows']:,} test rows, each scored as a request. A package may lose: "
        f"{limits}; in fp32 it differs from `recsys predict` by at most {MAX_DIFFERENCE:g}. "
        "`bf16` has tables in fp32, and products of attention and ensemble in bfloat16."
    ]

    title = "AUC of packages by the type of their tables and of their products"
    return Result("package_accuracy", title, records, columns, rows, None, reading)


if __name__ == "__main__":
    sys.exit(0 if auto_cli(accuracy, as_positional=False) else 1)
