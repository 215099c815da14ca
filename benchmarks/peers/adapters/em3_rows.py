"""EM3 as public implementations build it: a Q-Former over every history item, with gradient.

A plain PyTorch model after the authors' code and MMCTR-Bench. The item id is one more token, and
DIN pools the fused vectors. CIC compares content and id of the target, with the batch as negatives.
It has no memory bank, LoRA or similarities.

Shapes: N rows, B batch, L history length, I items, K numbers, U distinct items of a batch,
M modalities, Q queries, T tokens (Q + 1 + M), D dimension, E twice D.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from peer_rows import PeerJob, Rows, batches_by_length, item_vectors, order_within_users
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 200
TARGET = 11  # code of a target's stars; 0 pads, 1 to 10 are half stars
TEMPERATURE = 0.1
MAX_EPOCHS, VALIDATIONS, PATIENCE = 8, 2, 3


class JointAttention(nn.Module):
    """One published layer: self-attention over queries and tokens, then LayerNorm(x + residual)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(dim, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:  # [U, T, D] -> [U, T, D]
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.norm(tokens + self.dropout(mixed))


class EM3(nn.Module):
    """Ids, stars and histories -> logits and the CIC loss; `vectors` are [I, V] by modality."""

    def __init__(
        self,
        vectors: list[np.ndarray],
        num_users: int,
        num_numbers: int,
        settings: dict[str, float],
    ) -> None:
        super().__init__()
        dim, dropout = int(settings["dim"]), settings["dropout"]
        # Row 0 pads.
        self.vectors = [
            torch.from_numpy(np.pad(matrix, ((1, 0), (0, 0)))).float() for matrix in vectors
        ]
        self.maps = nn.ModuleList(nn.Linear(matrix.shape[1], dim) for matrix in self.vectors)
        self.items = nn.Embedding(len(self.vectors[0]), dim, padding_idx=0)
        self.users = nn.Embedding(num_users, dim)
        self.stars = nn.Embedding(TARGET + 1, dim, padding_idx=0)
        self.queries = nn.Parameter(torch.empty(int(settings["queries"]), dim))
        nn.init.xavier_uniform_(self.queries)
        self.layers = nn.Sequential(
            *(JointAttention(dim, 4, dropout) for _ in range(int(settings["layers"])))
        )
        self.project = nn.Linear(self.queries.numel(), dim)
        self.score = nn.Sequential(nn.Linear(8 * dim, 64), nn.PReLU(), nn.Linear(64, 1))
        self.content, self.contrast = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.head = nn.Sequential(
            *(nn.Linear(4 * dim + 1 + num_numbers, 256), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 1)),
        )
        self.weight = settings["contrastive_weight"]

    def fused(self, items: Tensor) -> Tensor:  # [U] -> [U, D]
        modalities = [layer(matrix[items]) for layer, matrix in zip(self.maps, self.vectors)]
        tokens = torch.stack([self.items(items), *modalities], dim=1)
        queries = self.queries.expand(len(items), -1, -1)
        tokens = self.layers(torch.cat([queries, tokens], dim=1))
        return self.project(tokens[:, : len(self.queries)].flatten(1))

    def _weights(self, history: Tensor, target: Tensor) -> Tensor:  # [B, L, E], [B, E] -> [B, L]
        """Score `[history, target, history - target, history * target]`, without that tensor."""
        first = self.score[0]
        w_history, w_target, w_difference, w_product = first.weight.chunk(4, dim=1)  # [64, E]
        matrices = w_history + w_difference + w_product * target[:, None]  # [B, 64, E]
        offsets = F.linear(target, w_target - w_difference, first.bias)  # [B, 64]
        return self.score[1:](history @ matrices.mT + offsets[:, None]).squeeze(2)

    def forward(
        self,
        users: Tensor,  # [B]
        items: Tensor,  # [B, L + 1], the target last; 0 pads
        stars: Tensor,  # [B, L + 1]
        numbers: Tensor,  # [B, K]
    ) -> tuple[Tensor, Tensor]:  # [B], []
        """Return the logits and the weighted CIC loss."""
        distinct, indices = torch.unique(items, return_inverse=True)
        vectors = torch.cat([self.fused(distinct)[indices], self.stars(stars)], dim=2)
        history, target, inside = vectors[:, :-1], vectors[:, -1], items[:, :-1] > 0
        weights = self._weights(history, target).masked_fill(~inside, 0)  # [B, L], as published
        interest = torch.einsum("bl,bld->bd", weights, history)
        fused = target[:, : self.content.in_features]
        content, ids = self.content(fused), self.contrast(self.items(items[:, -1]))
        length = inside.sum(1, keepdim=True).float().log1p()
        logits = self.head(
            torch.cat([self.users(users), interest, content, length, numbers], dim=1)
        )
        return logits.squeeze(1), self.weight * contrastive(content, ids, items[:, -1])


def contrastive(content: Tensor, ids: Tensor, items: Tensor) -> Tensor:  # [B, D] twice, [B] -> []
    """Return cross-entropy of each row against the batch in both directions."""
    products = F.normalize(content) @ F.normalize(ids).T / TEMPERATURE
    diagonal = torch.arange(len(items))
    is_same_item = items[:, None] == items[None, :]
    is_same_item[diagonal, diagonal] = False  # equal items are no negatives of each other
    products = products.masked_fill(is_same_item, -torch.inf)
    return (F.cross_entropy(products, diagonal) + F.cross_entropy(products.T, diagonal)) / 2


@dataclass(frozen=True)
class Columns:
    """Rows as the model reads them."""

    users: Tensor  # [N]
    items: Tensor  # [N, L + 1]
    stars: Tensor  # [N, L + 1]
    numbers: Tensor  # [N, K]
    labels: Tensor  # [N]

    @classmethod
    def of(cls, rows: Rows) -> Columns:
        """Pad the histories; ids begin at 1."""
        items = rows.padded(rows.history + 1, LENGTH)
        stars = rows.padded(np.rint(rows.parallel["history_stars"] * 10), LENGTH)
        target = np.full((len(rows), 1), TARGET)
        return cls(
            torch.from_numpy(rows.user),
            torch.from_numpy(np.concatenate([items, rows.item[:, None] + 1], axis=1)).long(),
            torch.from_numpy(np.concatenate([stars, target], axis=1)).long(),
            torch.from_numpy(rows.dense),
            torch.from_numpy(rows.label).float(),
        )

    @property
    def lengths(self) -> np.ndarray:  # [N]
        return (self.items[:, :-1] > 0).sum(1).numpy()

    def batch(self, row_indices: np.ndarray) -> tuple[Tensor, ...]:
        """Return users, items, stars, numbers and labels, without columns of padding alone."""
        rows = torch.from_numpy(row_indices)
        items = self.items[rows]
        longest = max(int((items[:, :-1] > 0).sum(1).max()), 1) + 1
        stars = self.stars[rows, -longest:]
        return (
            self.users[rows],
            items[:, -longest:],
            stars,
            self.numbers[rows],
            self.labels[rows],
        )


@torch.no_grad()
def scores(model: EM3, columns: Columns, size: int) -> np.ndarray:  # [N]
    """Return the logit of each row."""
    model.eval()
    logits = np.zeros(len(columns.labels), np.float32)
    order = np.argsort(columns.lengths, kind="stable")
    for first in range(0, len(order), size):
        row_indices = order[first : first + size]
        *inputs, _ = columns.batch(row_indices)
        logits[row_indices] = model(*inputs)[0].numpy()
    return logits


def epoch_segments(lengths: np.ndarray, size: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Yield the batches of each segment of an epoch, after which the model is validated."""
    random = np.random.default_rng(seed)
    for _ in range(MAX_EPOCHS):
        batches = batches_by_length(lengths, size, random)
        segment_size = -(-len(batches) // VALIDATIONS)
        for first in range(0, len(batches), segment_size):
            yield batches[first : first + segment_size]


def train(model: EM3, columns: dict[str, Columns], valid: Rows, job: PeerJob) -> None:
    """Train, and leave the model with the weights that were best in validation."""
    size, waited = job.settings["batch_size"], 0
    optimizer = torch.optim.Adam(model.parameters(), lr=job.settings["learning_rate"])
    best, weights = -1.0, copy.deepcopy(model.state_dict())
    for segment in epoch_segments(columns["train"].lengths, size, job.seed):
        model.train()
        for row_indices in segment:
            *inputs, labels = columns["train"].batch(row_indices)
            logits, contrast = model(*inputs)
            optimizer.zero_grad()
            (F.binary_cross_entropy_with_logits(logits, labels) + contrast).backward()
            optimizer.step()
        value = order_within_users(valid, scores(model, columns["valid"], size))
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
    num_users = max(int(split_rows.user.max()) for split_rows in rows.values()) + 1
    columns = {split: Columns.of(split_rows) for split, split_rows in rows.items()}
    num_numbers = columns["train"].numbers.shape[1]
    model = EM3(item_vectors(job.rows), num_users, num_numbers, job.settings)
    train(model, columns, rows["valid"], job)
    size = job.settings["batch_size"]
    job.write(start, **{split: scores(model, columns[split], size) for split in ("valid", "test")})


if __name__ == "__main__":
    main()
