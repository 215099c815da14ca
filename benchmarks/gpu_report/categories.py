"""A synthetic dataset for DLRM: 26 id columns, each with its own table, and 13 numbers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TABLES, NUMBERS, ROWS, IDS = 26, 13, 131_072, 100_000
QUICK_ROWS, QUICK_IDS = 64, 50
NAMES = [f"c{column}" for column in range(TABLES)]


def write_categories(folder: Path, quick: bool = False) -> Path:
    """Write the dataset unless it is there; return its folder. The first column is the item."""
    num_rows, num_ids = (QUICK_ROWS, QUICK_IDS) if quick else (ROWS, IDS)
    folder = folder / ("dlrm-quick" if quick else "dlrm")
    if (folder / "schema.yaml").is_file():
        return folder
    rng = np.random.default_rng(0)
    for split, rows in (("train", num_rows), ("valid", 64), ("test", 64)):
        ids = {name: rng.integers(num_ids, size=rows) for name in NAMES}
        numbers = {f"n{column}": rng.random(rows, np.float32) for column in range(NUMBERS)}
        label = {"liked": rng.integers(2, size=rows).astype(np.float32)}
        (folder / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(ids | numbers | label), folder / split / "part-0.parquet")
    columns = [f"  {name}: {{kind: id, num_embeddings: {num_ids}}}" for name in NAMES]
    columns += [f"  n{column}: {{kind: dense}}" for column in range(NUMBERS)]
    text = "\n".join(["target_item: c0", "group: c1", "columns:", *columns])
    (folder / "schema.yaml").write_text(text + "\n  liked: {kind: label}\n")
    return folder
