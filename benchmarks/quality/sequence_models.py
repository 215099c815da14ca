"""RecBole's sequence models on the training rows of a run, measured on its test rows.

Shapes: R test rows, I items.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.rows import METADATA
from benchmarks.peers.trainings import PeerTraining
from recsys.build import Job
from recsys.checkpoint.run_folder import read_item_counts
from recsys.data.events.samples import SPLITS
from recsys.data.parquet.columns import RowColumns
from recsys.data.row_source import open_rows
from recsys.distributed.ranks import Ranks
from recsys.evaluation.predict import load_run
from recsys.evaluation.retrieval import catalogue_of, row_gains
from recsys.search.search import dataset_digest
from recsys.serving.retrieval.baselines import metrics_by_frequency, settings_with_vectors
from recsys.serving.retrieval.query_rows import index_of, rank_rows, read_query_rows
from recsys.storage.files import atomic_folder

MODELS = ("SASRec", "GRU4Rec", "BERT4Rec")
FIXED = {"length": 50, "width": 64, "batch_size": 256, "epochs": 100, "patience": 3}


class SequenceModel(NamedTuple):
    """Metrics of a model, the NDCG of rows at the first depth [R], seconds and GB of training."""

    metrics: dict[str, Any]
    gains: Tensor
    seconds: float
    peak: float


def sequence_models(
    run: Path, out: Path, models: Sequence[str], ranks: Ranks
) -> dict[str, SequenceModel]:
    """Train some of `MODELS` on the rows of a run, unless that was done, and measure them."""
    job = load_run(run, None, ranks, ranks.device.type)
    settings, items = settings_with_vectors(run, job), np.asarray(catalogue_of(job))
    test = read_query_rows(job, "test", items, read_item_counts(run, job.schema.item_id_limit))
    out = out.absolute()  # programs run in folders of their own
    rows = _write_rows(job, items, out)
    with np.load(rows / "test.npz") as arrays:
        assert np.array_equal(arrays["item"], test.targets)  # the same rows, in order
    sizes = {"num_items": len(items), "exclude_seen": settings.exclude_seen}
    (requirements,) = (peer.requirements for peer in PEERS if peer.name == "RecBole SASRec")
    compared = {}
    for model in models:
        fixed = {**FIXED, **sizes, "model": model}
        peer = Peer(f"RecBole {model}", "recbole_next_item", requirements, {}, fixed)
        training = PeerTraining(peer, rows, {}, 0, out)
        scores = training.result()["test"]
        above, tied = map(torch.from_numpy, rank_rows(scores, test, settings.exclude_seen))
        gains = row_gains("ndcg", above, tied, settings.depths[0])
        metrics = metrics_by_frequency(above, tied, test, settings)
        compared[peer.name] = SequenceModel(metrics, gains, *training.cost())
    return compared


def _write_rows(job: Job, items: np.ndarray, out: Path) -> Path:
    """Write histories and items of each split by index in the catalogue, unless it is done.

    Rows with a positive label whose item is in the catalogue, as those that are measured.
    """
    digest = dataset_digest(job.root)
    folder = out / "rows" / digest
    if not folder.exists():
        with atomic_folder(folder) as partial:
            for split in SPLITS:
                sequences = _sequences(job, split, items)
                np.savez(partial / f"{split}.npz", **sequences)  # type: ignore[arg-type]
            (partial / METADATA).write_text(json.dumps({"dataset": digest, "items": len(items)}))
    return folder


def _sequences(job: Job, split: str, items: np.ndarray) -> dict[str, np.ndarray]:
    schema = job.schema
    assert schema.history is not None
    source = open_rows(job.config.source, job.root, split, schema, job.config.on_bad_row)
    rows = RowColumns.of(pa.concat_tables(source.read(*source.share(0, 1))))
    (label, *_), targets = schema.of_kind("label"), index_of(items, rows.values(schema.target_item))
    rows = rows.take(np.flatnonzero((rows.values(label) > 0) & (targets >= 0)))
    history, lengths = index_of(items, rows.values(schema.history)), rows.lengths(schema.history)
    row = np.repeat(np.arange(rows.num_rows), lengths)[history >= 0]
    lengths = np.bincount(row, minlength=rows.num_rows)
    return {
        "user": np.zeros(rows.num_rows, np.int64),
        "item": index_of(items, rows.values(schema.target_item)),
        "label": np.ones(rows.num_rows, np.float32),
        "offsets": np.append(0, lengths.cumsum()),
        "history": history[history >= 0],
    }
