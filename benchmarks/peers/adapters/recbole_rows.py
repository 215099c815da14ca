"""SASRec of RecBole, which predicts the next liked item from the items that the user liked before.

It trains on positive rows only, as published. A row's score is that of its target.
Shapes: N rows, B batch, L history length.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from peer_rows import PeerJob, Rows, order_within_users, padded_behind
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec

torch.autograd.set_detect_anomaly(False)  # an import of RecBole turns it on, which is slow
LENGTH = 50
MAX_EPOCHS, PATIENCE = 40, 3


class Items:
    """The number of items, which is all that the model reads of a dataset."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items + 1

    def num(self, field: str) -> int:
        del field
        return self.num_items


def interactions(rows: Rows) -> dict[str, np.ndarray]:
    """Return the liked history, its length and the target of each row."""
    is_liked = rows.parallel["history_liked"] > 0.5
    ends = np.concatenate([[0], np.cumsum(is_liked)])
    liked = Rows(rows.user, rows.item, rows.label, ends[rows.offsets], rows.history[is_liked], {})
    return padded_behind(liked, LENGTH)


def batches(columns: dict[str, np.ndarray], order: np.ndarray, size: int) -> Any:
    """Yield interactions in an order."""
    for first in range(0, len(order), size):
        row_indices = order[first : first + size]
        yield Interaction(
            {n: torch.from_numpy(column[row_indices]).long() for n, column in columns.items()}
        )


@torch.no_grad()
def scores(model: SASRec, columns: dict[str, np.ndarray], size: int) -> np.ndarray:  # [N]
    """Return the score of each row's target."""
    model.eval()
    order = np.arange(len(columns["item_id"]))
    return torch.cat([model.predict(batch) for batch in batches(columns, order, size)]).numpy()


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    rows, settings = job.read(), dict(job.settings)
    start = time.perf_counter()
    torch.manual_seed(job.seed)
    random = np.random.default_rng(job.seed)
    size, rate = settings.pop("batch_size"), settings.pop("learning_rate")
    items = 1 + max(
        int(max(split_rows.item.max(), split_rows.history.max(initial=0)))
        for split_rows in rows.values()
    )
    fixed = {"MAX_ITEM_LIST_LENGTH": LENGTH, "use_gpu": False}
    fixed |= {"loss_type": "CE", "train_neg_sample_args": None}
    config = Config(model="SASRec", dataset="rows", config_dict={**fixed, **settings})
    model = SASRec(config, Items(items))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    columns = {split: interactions(split_rows) for split, split_rows in rows.items()}
    positive = np.flatnonzero(rows["train"].label > 0.5)
    best, weights, waited = -1.0, model.state_dict(), 0
    for _ in range(MAX_EPOCHS):
        model.train()
        for batch in batches(columns["train"], random.permutation(positive), size):
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()
        value = order_within_users(rows["valid"], scores(model, columns["valid"], size))
        waited += 1
        if value > best:
            best, weights, waited = value, copy.deepcopy(model.state_dict()), 0
        if waited == PATIENCE:
            break
    model.load_state_dict(weights)
    job.write(start, **{split: scores(model, columns[split], size) for split in ("valid", "test")})


if __name__ == "__main__":
    main()
