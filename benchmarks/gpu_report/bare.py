"""TorchRec's own DLRM and training loop on the same rows, the baseline of the product's speed."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.gpu_report.categories import IDS, NAMES, NUMBERS, QUICK_IDS

DIM = 16


def bare_steps(data: Path, rows: int, source: str, device: torch.device) -> Callable[[], Any]:
    """Return a function that makes one training step of a DLRM, by TorchRec's pipeline alone."""
    num_ids = QUICK_IDS if data.name.endswith("quick") else IDS
    tables = [
        EmbeddingBagConfig(
            num_embeddings=num_ids, embedding_dim=DIM, name=f"t_{name}", feature_names=[name]
        )
        for name in NAMES
    ]
    bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    # As many units as the product's defaults for `dlrm`.
    dlrm = DLRM(bags, NUMBERS, [64, DIM], [128, 64, 1], dense_device=device)
    _apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), {"lr": 0.05})
    model = DistributedModelParallel(DLRMTrain(dlrm), device=device)
    dense = KeyedOptimizerWrapper(
        {n: p for n, p in model.named_parameters() if not n.startswith("model.sparse_arch")},
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    )
    optimizer = CombinedOptimizer([model.fused_optimizer, dense])
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    batches = _batches(data, rows, device.type == "cuda")
    if source == "memory":
        batches = itertools.cycle(list(itertools.islice(batches, 4 if rows <= 8192 else 1)))
    model.train()
    return lambda: pipeline.progress(batches)


def _batches(data: Path, rows: int, pins: bool) -> Iterator[Batch]:
    """Read the rows again and again, as a loop of one's own would."""
    while True:
        file = pq.ParquetFile(data / "train" / "part-0.parquet")
        for chunk in file.iter_batches(min(rows, file.metadata.num_rows)):
            columns = {name: chunk.column(name).to_numpy() for name in chunk.schema.names}
            ids = np.concatenate([columns[name] for name in NAMES])
            numbers = np.stack([columns[f"n{column}"] for column in range(NUMBERS)], axis=1)
            lengths = torch.ones(len(ids), dtype=torch.int32)
            sparse = KeyedJaggedTensor.from_lengths_sync(NAMES, torch.from_numpy(ids), lengths)
            labels = torch.from_numpy(columns["liked"].copy())
            batch = Batch(torch.from_numpy(numbers), sparse, labels)
            yield batch.pin_memory() if pins else batch
