"""DIN of Torch-RecHub: histories of ids and of stars, each with its own attention.

Its trainer keeps the best epoch by validation AUC. Shapes: N rows, L history length.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import torch
from peer_rows import PeerJob, Rows
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking.din import DIN
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

LENGTH = 200
TARGET = 11  # code of a target's stars; 0 pads, 1 to 10 are half stars
MAX_EPOCHS, PATIENCE = 8, 2


def columns(rows: Rows) -> dict[str, np.ndarray]:
    """Return the columns of rows by name."""
    return {
        "user": rows.user,
        "length": np.log1p(np.diff(rows.offsets)).astype(np.float32),
        "item": rows.item + 1,
        "stars": np.full(len(rows), TARGET),
        "history_item": rows.padded(rows.history + 1, LENGTH),
        "history_stars": rows.padded(np.rint(rows.parallel["history_stars"] * 10), LENGTH),
    }


def build(num_users: int, num_items: int, settings: dict[str, float]) -> DIN:
    """Return the model."""
    dim = int(settings["embedding_dim"])
    sizes = {"item": num_items + 1, "stars": TARGET + 1}
    targets = [SparseFeature(name, size, dim) for name, size in sizes.items()]
    histories = [
        SequenceFeature(f"history_{name}", size, dim, "concat", shared_with=name, padding_idx=0)
        for name, size in sizes.items()
    ]
    return DIN(
        features=[SparseFeature("user", num_users, dim)],
        history_features=histories,
        target_features=targets,
        mlp_params={"dims": settings["units"], "dropout": settings["dropout"]},
        attention_mlp_params={"dims": settings["attention_units"]},
    )


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    rows, settings = job.read(), job.settings
    start = time.perf_counter()
    torch.manual_seed(job.seed)
    np.random.seed(job.seed)
    inputs = {split: (columns(split_rows), split_rows.label) for split, split_rows in rows.items()}
    train, valid, test = DataGenerator(*inputs["train"]).generate_dataloader(
        *inputs["valid"], *inputs["test"], batch_size=settings["batch_size"]
    )
    users = max(int(split_rows.user.max()) for split_rows in rows.values()) + 1
    items = 1 + max(int(split_rows.item.max(initial=0)) for split_rows in rows.values())
    items = max(
        items, 1 + max(int(split_rows.history.max(initial=0)) for split_rows in rows.values())
    )
    model = build(users, items, settings)
    optimizer = {"lr": settings["learning_rate"], "weight_decay": settings["weight_decay"]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = CTRTrainer(
            model,
            optimizer_params=optimizer,
            n_epoch=MAX_EPOCHS,
            earlystop_patience=PATIENCE,
            device="cpu",
            model_path=folder,
        )
        trainer.fit(train, valid)
    model.load_state_dict(trainer.early_stopper.best_weights)
    scores = {"valid": valid, "test": test}
    job.write(
        start,
        **{split: np.array(trainer.predict(model, batches)) for split, batches in scores.items()},
    )


if __name__ == "__main__":
    main()
