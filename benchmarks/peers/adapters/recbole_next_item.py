"""RecBole's sequence models, trained to find the next item: a row is a history and its item.

Settings are RecBole's, except a width of 64. The best epoch of validation scores all items.
Shapes: N rows, B batch, L history length, I items.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peer_rows import PeerJob, Rows, padded_behind
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.data.transform import MaskItemSequence

DEPTH = 10
MODULES = {"SASRec": "sasrec", "GRU4Rec": "gru4rec", "BERT4Rec": "bert4rec"}


def batches(
    columns: dict[str, np.ndarray], order: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, Interaction]]:
    """Yield row indices and the rows, in an order."""
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        arrays = {name: torch.from_numpy(column[rows]) for name, column in columns.items()}
        yield rows, Interaction({name: column.long() for name, column in arrays.items()})


@torch.no_grad()
def scores(model: Any, columns: dict[str, np.ndarray], num_items: int) -> np.ndarray:
    """Return the score of each item for each row, float32 [N, I]."""
    model.eval()
    every = np.empty((len(columns["item_id"]), num_items), np.float32)
    for rows, batch in batches(columns, np.arange(len(every)), 256):
        every[rows] = model.full_sort_predict(batch).view(len(rows), -1)[:, 1 : num_items + 1]
    return every


def gain(rows: Rows, values: np.ndarray, exclude_seen: bool) -> float:  # [N, I]
    """Return the mean NDCG of validation, with or without the items of the histories."""
    values, row = values.copy(), np.arange(len(values))
    target = values[row, rows.item]
    if exclude_seen:
        values[np.repeat(row, np.diff(rows.offsets)), rows.history] = -np.inf
    rank = (values > target[:, None]).sum(axis=1)
    return float(np.where(rank < DEPTH, 1 / np.log2(rank + 2), 0).mean())


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    rows, settings = job.read(), job.settings
    start = time.perf_counter()
    torch.manual_seed(job.seed)
    random, name = np.random.default_rng(job.seed), settings["model"]
    fixed = {
        "MAX_ITEM_LIST_LENGTH": settings["length"],
        "use_gpu": False,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "embedding_size": settings["width"],
        "hidden_size": settings["width"],
    }
    config = Config(model=name, dataset="rows", config_dict=fixed)
    num_items = settings["num_items"]
    mask = MaskItemSequence(config) if name == "BERT4Rec" else None  # names columns in `config`
    dataset = SimpleNamespace(num=lambda _: num_items + 1)
    module = importlib.import_module(f"recbole.model.sequential_recommender.{MODULES[name]}")
    torch.autograd.set_detect_anomaly(False)  # the import turns it on, which is slow
    model = getattr(module, name)(config, dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    columns = {split: padded_behind(part, settings["length"]) for split, part in rows.items()}
    has_history = np.flatnonzero(np.diff(rows["train"].offsets) > 0)  # RecBole has no other rows
    best, weights, waited = -1.0, model.state_dict(), 0
    for _ in range(settings["epochs"]):
        model.train()
        order = random.permutation(has_history)
        for _, batch in batches(columns["train"], order, settings["batch_size"]):
            optimizer.zero_grad()
            model.calculate_loss(batch if mask is None else mask(dataset, batch)).backward()
            optimizer.step()
        values = scores(model, columns["valid"], num_items)
        value = gain(rows["valid"], values, settings["exclude_seen"])
        print(f"NDCG@{DEPTH} of validation {value:.4f}", flush=True)
        waited += 1
        if value > best:
            best, weights, waited = value, copy.deepcopy(model.state_dict()), 0
        if waited == settings["patience"]:
            break
    model.load_state_dict(weights)
    job.write(start, test=scores(model, columns["test"], num_items))


if __name__ == "__main__":
    main()
