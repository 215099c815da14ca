"""DIN, DCNv2 and FinalMLP of FuxiCTR, by its classes for long histories.

History items have ids, stars and principal components of their content.
Shapes: N rows, B batch, L history length, I items, V width of content.
"""

from __future__ import annotations

import importlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.torch_utils import seed_everything
from peer_rows import (
    PeerJob,
    Rows,
    batches_by_length,
    item_vectors,
    principal_components,
)

LENGTH = 200
TARGET = 11  # code of a target's stars; 0 pads, 1 to 10 are half stars
MAX_EPOCHS, VALIDATIONS = 8, 2
Inputs = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]


class Batches:
    """Batches of rows as the classes for long histories read them."""

    def __init__(
        self,
        rows: Rows,
        content: np.ndarray,
        batch_size: int,
        random: np.random.Generator | None = None,
    ) -> None:
        """Pad the histories; ids begin at 1. Without `random`, shorter histories come first."""
        self.rows, self.batch_size, self.random = rows, batch_size, random
        self.content = torch.from_numpy(np.concatenate([np.zeros_like(content[:1]), content]))
        items = rows.padded(rows.history + 1, LENGTH)
        stars = rows.padded(np.rint(rows.parallel["history_stars"] * 10), LENGTH)
        self.items = np.concatenate([items, rows.item[:, None] + 1], axis=1)
        self.stars = np.concatenate([stars, np.full((len(rows), 1), TARGET)], axis=1)
        self.lengths = np.minimum(np.diff(rows.offsets), LENGTH)
        self.numbers = list(rows.dense.T)
        self.order = np.argsort(self.lengths, kind="stable")

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Inputs]:
        """Yield (columns of rows [B], columns of items [B * (L + 1)], mask [B, L])."""
        if self.random is not None:
            yield from map(
                self._batch, batches_by_length(self.lengths, self.batch_size, self.random)
            )
            return
        for first in range(0, len(self.order), self.batch_size):
            yield self._batch(self.order[first : first + self.batch_size])

    def in_order_of_rows(self, scores: np.ndarray) -> np.ndarray:  # [N] -> [N]
        """Return the scores of batches without `random` by row."""
        by_row = np.empty_like(scores)
        by_row[self.order] = scores
        return by_row

    def _batch(self, row_indices: np.ndarray) -> Inputs:
        longest = max(int(self.lengths[row_indices].max()), 1)
        items = torch.from_numpy(self.items[row_indices, -longest - 1 :]).long()
        stars = torch.from_numpy(self.stars[row_indices, -longest - 1 :]).long()
        rows = {
            "user": torch.from_numpy(self.rows.user[row_indices]),
            "length": torch.from_numpy(np.log1p(self.lengths[row_indices])).float(),
            **{
                f"number_{column}": torch.from_numpy(values[row_indices])
                for column, values in enumerate(self.numbers)
            },
            "group": torch.from_numpy(self.rows.user[row_indices]),
            "label": torch.from_numpy(self.rows.label[row_indices]),
        }
        flat = items.flatten()
        item_features = {"item": flat, "stars": stars.flatten(), "content": self.content[flat]}
        return rows, item_features, (items[:, :-1] > 0).float()


def feature_map(
    num_users: int, num_items: int, num_numbers: int, width: int, dim: int, folder: str
) -> FeatureMap:
    """Describe the columns to FuxiCTR."""
    features = FeatureMap("rows", folder)
    features.labels, features.group_id, features.default_emb_dim = ["label"], "group", dim
    ids = {"type": "categorical", "padding_idx": 0}
    number = {"type": "numeric", "source": "user"}
    features.features = OrderedDict(
        user={"type": "categorical", "source": "user", "vocab_size": num_users},
        length=number,
        **{f"number_{column}": number for column in range(num_numbers)},
        group={"type": "meta", "source": ""},
        item={**ids, "source": "item", "vocab_size": num_items + 1},
        stars={**ids, "source": "item", "vocab_size": TARGET + 1},
        content={"type": "embedding", "source": "item", "pretrain_dim": width},
    )
    return features


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    settings = dict(job.settings)
    name, dim = settings.pop("model"), settings["embedding_dim"]
    batch_size = settings.pop("batch_size")
    rows = job.read()
    start = time.perf_counter()
    seed_everything(job.seed)
    random = np.random.default_rng(job.seed)
    content = principal_components(item_vectors(job.rows), settings.pop("content_dim"))
    batches = {
        split: Batches(split_rows, content, batch_size, random if split == "train" else None)
        for split, split_rows in rows.items()
    }
    users = max(int(split_rows.user.max()) for split_rows in rows.values()) + 1
    folder = str(job.out.parent)
    num_items, width = content.shape
    num_numbers = len(batches["train"].numbers)
    features = feature_map(users, num_items, num_numbers, width, dim, folder)
    model_class = getattr(importlib.import_module(f"model_zoo.LongCTR.{name}.{name}"), name)
    model = model_class(
        features,
        model_id=job.out.stem,
        monitor={"AUC": 1, "gAUC": 1},
        metrics=["AUC", "gAUC"],
        early_stop_patience=3,
        eval_steps=max(len(batches["train"]) // VALIDATIONS, 1),
        model_root=folder,
        optimizer="adam",
        loss="binary_crossentropy",
        verbose=0,
        **settings,
    )
    os.makedirs(model.model_dir, exist_ok=True)
    model.fit(batches["train"], epochs=MAX_EPOCHS, validation_data=batches["valid"])
    scores = {
        split: batches[split].in_order_of_rows(model.predict(batches[split]))
        for split in ("valid", "test")
    }
    job.write(start, **scores)
    os.remove(model.checkpoint)


if __name__ == "__main__":
    main()
