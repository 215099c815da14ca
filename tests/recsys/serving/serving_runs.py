"""Runs, their packages, and the requests of a Parquet file's rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import Config
from recsys.data.prepare import prepare_transforms
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import predict
from recsys.serving.export import export_run
from recsys.training.train import train
from tests.datasets import write_dataset

USER_COLUMNS = ("user", "genres", "price", "city", "when")
HISTORY_COLUMNS = ("history", "history_liked")
TRANSFORMED = """\
columns:
  cheap:   {kind: id, num_embeddings: 4, column: price, transform: [{bucketize: {quantiles: 4}}]}
  scaled:  {kind: dense, column: price, transform: [log1p, standardize]}
  place:   {kind: id, num_embeddings: 9, column: [city, hour], transform: [cross],
            vocabulary: {kind: hash}}
  hour:    {kind: id, num_embeddings: 24, column: when, transform: [{hour: Asia/Tokyo}]}
"""


def exported(folder: Path, config: Config) -> tuple[Path, np.ndarray]:
    """Trains a run on the small dataset; returns its package and `predict` of the test rows."""
    data, run, package = folder / "data", folder / "run", folder / "package"
    if not data.exists():
        add_transforms(write_dataset(data))
    with joined_ranks("cpu") as ranks:
        train(replace(config, epochs=1), str(data), run, ranks)
        export_run(run, package, "fp32", ranks)
        predict(run, [str(data / "test")], folder / "predictions.parquet", None, ranks, "cpu")
    labels = pq.read_table(folder / "predictions.parquet")
    names = [name for name in labels.column_names if name.startswith("prediction_")]
    return package, np.stack([labels[name].to_numpy() for name in names], axis=1)


def add_transforms(data: Path) -> None:
    """Adds columns to all rows, and others that are made of them to the schema."""
    random = np.random.default_rng(0)
    for path in [path for split in ("train", "valid", "test") for path in data.glob(f"{split}/*")]:
        table = pq.read_table(path)
        cities = pa.array(random.choice(["Rom", "Köln"], table.num_rows))
        times = pa.array(random.integers(10**9, size=table.num_rows)).cast(pa.timestamp("s"))
        table = table.append_column("city", cities).append_column("when", times)
        pq.write_table(table, path)
    path = data / "schema.yaml"
    path.write_text(path.read_text().replace("columns:\n", TRANSFORMED, 1))
    prepare_transforms(str(data))


def requests(data: Path, history: tuple[str, ...] = HISTORY_COLUMNS) -> Iterator[dict[str, Any]]:
    """The test rows, each as a request for its one item."""
    for row in pq.read_table(data / "test").to_pylist():
        yield {
            "user": {name: row[name] for name in USER_COLUMNS if name in row},
            "history": {name: row[name] for name in history},
            "candidates": [row["item"]],
        }
