"""The training steps in which kernels are measured, with their datasets.

Setting A is that of the other benchmarks. DLRM reads 26 columns of ids, each with a table of
100,000 rows of width 16, and 13 dense features, as Criteo has; DIN reads histories of 50, 20 and 5
items by an attention of [256, 64] units. Both have a batch of 8192 rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.dataset import write_dataset
from benchmarks.settings import A, setting
from benchmarks.timing.steps import Variant

NUM_SPARSE, NUM_DENSE = 26, 13
HISTORIES = (50, 20, 5)
ID_ONLY = ("--content", "none")
SIMILARITY = ("--content.history.similarity_features", "true")
# DLRM has no dropout in TorchRec.
WIDE = ("--embedding.dim", "16", "--batch_size", "8192", "--ranking.dropout", "0", "--ranking.name")
DIN = (*WIDE, "din", "--ranking.attention_units", "[256,64]")


def cases(out: Path, quick: bool) -> list[Variant]:
    """Write the datasets under `out` if they are missing; return a variant for each case."""
    chosen = setting("A", quick)
    data, words = chosen.prepared(out)
    base = Variant("A, bank_lora", str(chosen.recipe), data, words)
    small = ("--batch_size", "16") if quick else ()
    found = [
        base.changed("A, ID-only", *ID_ONLY),
        base,
        base.changed("A, bank_lora, similarity features", *SIMILARITY),
    ]
    ids = Variant("", str(A.recipe), "", ID_ONLY, loaded_batches=4)
    criteo = _write_criteo(out / f"criteo-{quick}", 64 if quick else 65_536, 50 if quick else 10**5)
    name = "DLRM 26 x 100,000 x 16, batch 8192"
    found.append(ids.changed(name, *WIDE, "dlrm", *small, data=str(criteo)))
    for history in HISTORIES:
        size = replace(chosen.size, history=history, text_dim=0, image_dim=0)
        if not quick:
            size = replace(size, num_rows=65_536)
        data = str(write_dataset(out / f"din-{quick}-{history}", size))
        name = f"DIN [256, 64], batch 8192, history {history}"
        found.append(ids.changed(name, *DIN, *small, data=data))
    return found


def _write_criteo(folder: Path, num_rows: int, num_embeddings: int) -> Path:
    """Write random rows of 26 columns of ids and 13 dense features, unless they exist."""
    if (folder / "schema.yaml").exists():
        return folder
    rng = np.random.default_rng(0)
    lines = ["target_item: id_0", "group: id_1", "columns:"]
    kind = f"{{kind: id, num_embeddings: {num_embeddings}}}"
    lines += [f"  id_{column}: {kind}" for column in range(NUM_SPARSE)]
    lines += [f"  dense_{column}: {{kind: dense}}" for column in range(NUM_DENSE)]
    lines += ["  clicked: {kind: label}", "items:", "  id: id_0", "  columns:"]
    for split, rows in (("train", num_rows), ("valid", 64), ("test", 64)):
        columns = {
            f"id_{column}": rng.integers(num_embeddings, size=rows) for column in range(NUM_SPARSE)
        }
        columns |= {
            f"dense_{column}": rng.random(rows).astype(np.float32) for column in range(NUM_DENSE)
        }
        columns["clicked"] = rng.integers(2, size=rows).astype(np.float32)
        _write(folder / split, pa.table(columns))
    _write(folder / "items", pa.table({"id_0": pa.array(np.arange(num_embeddings))}))
    (folder / "schema.yaml").write_text("\n".join(lines) + "\n")
    return folder


def _write(folder: Path, table: pa.Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "part-0.parquet")
