"""LightGBM on statistics of users and items, and on content similarities.

Statistics of an item are of training rows, without the row itself. Similarities are cosines of the
target to its history by modality. Shapes: N rows, L history length, K features.
"""

from __future__ import annotations

import time

import lightgbm
import numpy as np
from peer_rows import PeerJob, Rows, item_vectors

LENGTH = 200
NEAREST = (1, 5, 20)
PRIOR = 5.0  # rows that a mean of labels is shrunk by
MOST_ROUNDS, PATIENCE = 2000, 50


def features(rows: Rows, train: Rows, vectors: list[np.ndarray]) -> np.ndarray:  # [N, K]
    """Return the features of rows."""
    blocks = [_of_item(rows, train), *(_of_history(rows, matrix) for matrix in vectors)]
    return np.concatenate([_of_user(rows), *blocks], axis=1)


def _of_user(rows: Rows) -> np.ndarray:
    """Return the length of the history, and means of its parallel lists: of all and the last."""
    lengths = np.diff(rows.offsets)
    columns = [np.log1p(lengths)]
    for values in rows.beside.values():
        sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        for last in (LENGTH, 20, 5):
            count = np.minimum(lengths, last)
            end = rows.offsets[1:]
            columns.append((sums[end] - sums[end - count]) / np.maximum(count, 1))
    return np.stack(columns, axis=1)


def _of_item(rows: Rows, train: Rows) -> np.ndarray:
    """Return the training rows of the item and the mean of their labels, without the row itself."""
    size = int(max(rows.item.max(), train.item.max())) + 1
    count = np.bincount(train.item, minlength=size).astype(np.float64)
    positive = np.bincount(train.item, train.label, minlength=size)
    row_counts, label_sums = count[rows.item], positive[rows.item]
    if rows is train:
        row_counts, label_sums = row_counts - 1, label_sums - train.label
    mean = (label_sums + PRIOR * train.label.mean()) / (row_counts + PRIOR)
    return np.stack([np.log1p(row_counts), mean], axis=1)


def _of_history(rows: Rows, vectors: np.ndarray) -> np.ndarray:
    """Return cosines to the history, and what its most similar items say of the target."""
    history = rows.padded(rows.history, LENGTH)
    inside = rows.padded(np.ones(len(rows.history)), LENGTH) > 0
    liked, stars = (
        rows.padded(rows.beside[f"history_{name}"], LENGTH) for name in ("liked", "stars")
    )
    cosines = (vectors @ vectors.T)[rows.item[:, None], history]
    return _similarities(cosines * inside, inside, liked, stars)


def _similarities(
    cosine: np.ndarray,  # [N, L], as the others
    inside: np.ndarray,
    liked: np.ndarray,
    stars: np.ndarray,
) -> np.ndarray:
    mean = (stars * inside).sum(1) / np.maximum(inside.sum(1), 1)
    deviation = (stars - mean[:, None]) * inside
    columns = []
    for mask in (inside & (liked > 0), inside & (liked <= 0)):
        weight = mask / np.maximum(mask.sum(1), 1)[:, None]
        columns += [(cosine * weight).sum(1), np.where(mask, cosine, 0).max(1)]
    order = np.argsort(-cosine, axis=1)[:, : max(NEAREST)]
    near = np.maximum(np.take_along_axis(cosine, order, 1), 0)
    near_deviation = np.take_along_axis(deviation, order, 1)
    for count in NEAREST:
        total = np.maximum(near[:, :count].sum(1), 1e-6)
        columns.append((near[:, :count] * near_deviation[:, :count]).sum(1) / total)
    columns.append((np.maximum(cosine, 0) ** 4 * deviation).sum(1))
    return np.stack(columns, axis=1)


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    rows = job.read()
    start = time.perf_counter()
    vectors = item_vectors(job.rows)
    inputs = {
        split: features(split_rows, rows["train"], vectors) for split, split_rows in rows.items()
    }
    settings = {"objective": "binary", "verbosity": -1, "num_threads": 1, "seed": job.seed}
    settings |= {"bagging_freq": 1, "deterministic": True, **job.settings}
    data = lightgbm.Dataset(inputs["train"], rows["train"].label)
    valid = lightgbm.Dataset(inputs["valid"], rows["valid"].label, reference=data)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    model = lightgbm.train(settings, data, MOST_ROUNDS, [valid], callbacks=[stop])
    job.write(start, **{split: model.predict(inputs[split]) for split in ("valid", "test")})


if __name__ == "__main__":
    main()
