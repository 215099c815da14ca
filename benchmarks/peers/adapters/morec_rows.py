"""Text-based SASRec as MoRec trains it: the next-item loss trains the item encoder.

An item vector encodes its text (Yuan et al., SIGIR 2023, arXiv 2303.13835). Each position of a
user's sequence predicts the next item among the distinct items of the batch, less the logarithm of
their popularity; the user's own items are no negatives. A row's score is that of its target.
Shapes: N rows, B sequences, L history length, U distinct items of a batch, D dimension.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from peer_rows import PeerJob, Rows, order_within_users
from text_items import TextItems
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH, PATIENCE = 20, 4


class TextSASRec(nn.Module):
    """Vectors of a history -> the vector of the next item at each position."""

    def __init__(self, items: TextItems, settings: dict[str, Any]) -> None:
        super().__init__()
        dim, dropout = items.map.out_features, settings["dropout"]
        self.items = items
        self.positions = nn.Embedding(LENGTH, dim)
        layer = nn.TransformerEncoderLayer(
            dim, 2, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, settings["layers"], nn.LayerNorm(dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor) -> Tensor:  # [B, L, D], padded behind -> [B, L, D]
        length = vectors.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        inputs = self.dropout(vectors + self.positions.weight[:length])
        return self.layers(inputs, mask=causal, is_causal=True)


def sequences(rows: Rows) -> Tensor:  # [S, L + 1], ids from 1, padded behind with 0
    """Return the items that each user took, in order of time, in chunks."""
    positive = np.flatnonzero(rows.label > 0.5)
    order = positive[np.argsort(rows.user[positive], kind="stable")]
    user_items = np.split(rows.item[order] + 1, np.flatnonzero(np.diff(rows.user[order])) + 1)
    chunks = [
        items[first : first + LENGTH + 1]
        for items in user_items
        for first in range(0, max(len(items) - 1, 1), LENGTH)
    ]
    padded = np.zeros((len(chunks), LENGTH + 1), np.int64)
    for row, chunk in zip(padded, chunks):
        row[: len(chunk)] = chunk
    return torch.from_numpy(padded[(padded > 0).sum(1) > 1])


def next_item_loss(model: TextSASRec, batch: Tensor, log_shares: Tensor) -> Tensor:
    """Return the cross-entropy of the next items among the distinct items of the batch."""
    distinct, indices = torch.unique(F.pad(batch, (0, 0, 1, 0)), return_inverse=True)
    vectors = F.pad(model.items(distinct[1:] - 1), (0, 0, 1, 0))  # row 0 pads
    indices = indices[1:]
    states = model(vectors[indices[:, :-1]])
    is_next = indices[:, 1:] > 0
    logits = states[is_next] @ vectors[1:].T - log_shares[distinct[1:]]
    owned = torch.zeros(len(batch), len(distinct), dtype=torch.bool).scatter_(1, indices, True)
    targets = indices[:, 1:][is_next]
    negatives = ~owned[is_next.nonzero()[:, 0]]
    negatives[torch.arange(len(targets)), targets] = True
    return F.cross_entropy(logits.masked_fill(~negatives[:, 1:], -torch.inf), targets - 1)


@torch.no_grad()
def scores(model: TextSASRec, rows: Rows) -> np.ndarray:  # [N]
    """Return the score of each row's target; 0 without a history."""
    model.eval()
    vectors = F.pad(model.items.all_vectors(), (0, 0, 1, 0))
    lengths = np.minimum(np.diff(rows.offsets), LENGTH)
    padded = rows.padded(rows.history + 1, LENGTH)
    behind = np.take_along_axis(padded, (np.arange(LENGTH) - lengths[:, None]) % LENGTH, axis=1)
    history, target = torch.from_numpy(behind).long(), torch.from_numpy(rows.item + 1).long()
    last = torch.from_numpy(lengths - 1)
    row_scores = []
    for block in torch.arange(len(rows)).split(1024):
        states = model(vectors[history[block]])[torch.arange(len(block)), last[block].clamp(min=0)]
        row_scores.append((states * vectors[target[block]]).sum(1) * (last[block] >= 0))
    return torch.cat(row_scores).numpy()


def train(model: TextSASRec, rows: dict[str, Rows], job: PeerJob) -> None:
    """Train, and leave the model with the weights that were best in validation."""
    settings, batches = job.settings, sequences(rows["train"])
    counts = torch.bincount(batches[batches > 0], minlength=len(model.items.mask) + 1)
    log_shares = (counts.clamp(min=1) / counts.sum()).log()
    head = [weight for name, weight in model.named_parameters() if not name.startswith("items.")]
    optimizer = model.items.optimizer(head, settings["learning_rate"], settings["encoder_rate"])
    best, weights, waited = -1.0, copy.deepcopy(model.state_dict()), 0
    for _ in range(settings["epochs"]):
        model.train()
        for order in torch.randperm(len(batches)).split(settings["batch_size"]):
            optimizer.zero_grad()
            next_item_loss(model, batches[order], log_shares).backward()
            optimizer.step()
        value = order_within_users(rows["valid"], scores(model, rows["valid"]))
        print(f"validation {value:.4f}", flush=True)
        waited += 1
        if value > best:
            best, weights, waited = value, copy.deepcopy(model.state_dict()), 0
        if waited == PATIENCE:
            break
    model.load_state_dict(weights)


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    rows = job.read()
    start = time.perf_counter()
    torch.manual_seed(job.seed)
    items = TextItems(job.rows, int(job.settings["dim"]), bool(job.settings["trained"]))
    model = TextSASRec(items, job.settings)
    train(model, rows, job)
    job.write(start, **{split: scores(model, rows[split]) for split in ("valid", "test")})


if __name__ == "__main__":
    main()
