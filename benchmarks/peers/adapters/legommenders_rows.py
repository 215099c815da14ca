"""Content-based DCN as Legommenders trains it: a language model with LoRA inside of a click model.

An item vector encodes its text, a user vector is additive attention over the latest items; the
click loss trains both (Liu et al., arXiv 2412.15973). The rows' numbers are inputs, as for other
peers. Each distinct item of a batch is encoded once; a batch has blocks of rows of one user, so
that these are few.
Shapes: N rows, B batch, L history length, D dimension, K numbers, W width of the joint features.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peer_rows import PeerJob, Rows, order_within_users
from text_items import TextItems
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH, ROWS_OF_USER = 20, 64
VALIDATIONS, PATIENCE = 2, 2


class Legommender(nn.Module):
    """Targets and histories as vectors of texts -> logits."""

    def __init__(self, items: TextItems, num_numbers: int, settings: dict[str, Any]) -> None:
        super().__init__()
        dim, dropout = items.map.out_features, settings["dropout"]
        self.items = items
        self.attention = nn.Sequential(
            nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False)
        )
        width = 2 * dim + num_numbers + 1
        self.cross = nn.ModuleList(nn.Linear(width, 1) for _ in range(settings["cross_layers"]))
        self.deep = nn.Sequential(
            *(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(dropout)),
        )
        self.output = nn.Linear(width + 128, 1)

    def forward(
        self,
        vectors: Tensor,  # [U + 1, D], row 0 pads
        target: Tensor,  # [B], rows of vectors
        history: Tensor,  # [B, L]
        numbers: Tensor,  # [B, K]
    ) -> Tensor:  # [B]
        clicked, inside = vectors[history], history > 0
        scores = self.attention(clicked).squeeze(2).masked_fill(~inside, -1e4)
        weights = scores.softmax(dim=1) * inside
        user = (weights.unsqueeze(2) * clicked).sum(1)
        length = inside.sum(1, keepdim=True).float().log1p()
        features = torch.cat([user, vectors[target], numbers, length], dim=1)
        crossed = features
        for layer in self.cross:  # x0 (w . x) + x, with the bias inside of the product
            crossed = features * layer(crossed) + crossed
        return self.output(torch.cat([crossed, self.deep(features)], dim=1)).squeeze(1)


class Columns:
    """Rows as the model reads them; ids begin at 1."""

    def __init__(self, rows: Rows) -> None:
        self.history = torch.from_numpy(rows.padded(rows.history + 1, LENGTH)).long()
        self.target = torch.from_numpy(rows.item + 1).long()
        self.numbers = torch.from_numpy(rows.dense)
        self.label = torch.from_numpy(rows.label).float()


def batches_by_user(user: np.ndarray, size: int, random: np.random.Generator) -> Iterator[Tensor]:
    """Yield rows of an epoch: blocks of one user's consecutive rows, in random order."""
    order = np.argsort(user, kind="stable")
    blocks = np.split(order, np.arange(ROWS_OF_USER, len(order), ROWS_OF_USER))
    shuffled = np.concatenate([blocks[index] for index in random.permutation(len(blocks))])
    for first in range(0, len(shuffled), size):
        yield torch.from_numpy(shuffled[first : first + size])


def logits_of(model: Legommender, columns: Columns, rows: Tensor) -> Tensor:  # [B]
    """Encode the distinct items of a batch, and score its rows."""
    ids = torch.cat([columns.target[rows, None], columns.history[rows]], dim=1)
    distinct, indices = torch.unique(ids, return_inverse=True)
    if distinct[0] > 0:  # no row pads
        distinct, indices = F.pad(distinct, (1, 0)), indices + 1
    vectors = F.pad(model.items(distinct[1:] - 1), (0, 0, 1, 0))
    return model(vectors, indices[:, 0], indices[:, 1:], columns.numbers[rows])


@torch.no_grad()
def scores(model: Legommender, columns: Columns, size: int) -> np.ndarray:  # [N]
    """Return the logit of each row."""
    model.eval()
    vectors = F.pad(model.items.all_vectors(), (0, 0, 1, 0))
    blocks = torch.arange(len(columns.label)).split(size)
    logits = [
        model(vectors, columns.target[rows], columns.history[rows], columns.numbers[rows])
        for rows in blocks
    ]
    return torch.cat(logits).numpy()


def train(
    model: Legommender, columns: dict[str, Columns], rows: dict[str, Rows], job: PeerJob
) -> None:
    """Train, and leave the model with the weights that were best in validation."""
    settings, random = job.settings, np.random.default_rng(job.seed)
    size, epochs = settings["batch_size"], settings["epochs"]
    head = [weight for name, weight in model.named_parameters() if not name.startswith("items.")]
    optimizer = model.items.optimizer(head, settings["learning_rate"], settings["encoder_rate"])
    best, weights, waited = -1.0, copy.deepcopy(model.state_dict()), 0
    for _ in range(epochs):
        steps = list(batches_by_user(rows["train"].user, size, random))
        for segment in np.array_split(np.arange(len(steps)), VALIDATIONS):
            model.train()
            for step in segment:
                logits = logits_of(model, columns["train"], steps[step])
                loss = F.binary_cross_entropy_with_logits(
                    logits, columns["train"].label[steps[step]]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            value = order_within_users(rows["valid"], scores(model, columns["valid"], size))
            print(f"validation {value:.4f}", flush=True)
            waited += 1
            if value > best:
                best, weights, waited = value, copy.deepcopy(model.state_dict()), 0
        if waited >= PATIENCE:
            break
    model.load_state_dict(weights)


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    rows = job.read()
    start = time.perf_counter()
    torch.manual_seed(job.seed)
    columns = {split: Columns(split_rows) for split, split_rows in rows.items()}
    items = TextItems(job.rows, int(job.settings["dim"]), bool(job.settings["trained"]))
    model = Legommender(items, columns["train"].numbers.shape[1], job.settings)
    train(model, columns, rows, job)
    size = job.settings["batch_size"]
    job.write(start, **{split: scores(model, columns[split], size) for split in ("valid", "test")})


if __name__ == "__main__":
    main()
