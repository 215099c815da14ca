"""LightGBM on statistics of users and items, and on content similarities.

Statistics of an item come from training rows; for training rows, from users of other folds or, if
the settings say `by_time`, from rows of earlier blocks. Similarities are cosines of the target to
its history by modality and, if the settings say `co_rating`, by common users.
Shapes: N rows, L history length, K features.
"""

from __future__ import annotations

import time

import lightgbm
import numpy as np
from item_similarities import (
    PaddedHistory,
    co_rating_features,
    item_statistics,
    similarity_features,
)
from peer_rows import PeerJob, Rows, item_vectors

LENGTH = 200
PRIOR = 5.0  # rows that a mean of labels is shrunk by
MAX_ROUNDS, PATIENCE = 2000, 50


def features(
    rows: Rows, train: Rows, vectors: list[np.ndarray], co_rating: bool, by_time: bool
) -> np.ndarray:  # [N, K]
    """Return the features of rows."""
    history = PaddedHistory.of_rows(rows, LENGTH)
    blocks = [_user_features(rows), item_statistics(rows, train, PRIOR, by_time)]
    blocks += [] if rows.numbers is None else [rows.numbers]
    for matrix in vectors:
        cosines = (matrix @ matrix.T)[rows.item[:, None], history.items]
        blocks.append(similarity_features(cosines, history))
    if co_rating:
        blocks.append(co_rating_features(rows, history, train, len(vectors[0]), by_time))
    return np.concatenate(blocks, axis=1)


def _user_features(rows: Rows) -> np.ndarray:
    """Return the length of the history, and means of its parallel lists: of all and the last."""
    lengths = np.diff(rows.offsets)
    columns = [np.log1p(lengths)]
    for values in rows.parallel.values():
        sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        for last in (LENGTH, 20, 5):
            count = np.minimum(lengths, last)
            end = rows.offsets[1:]
            columns.append((sums[end] - sums[end - count]) / np.maximum(count, 1))
    return np.stack(columns, axis=1)


def _inputs(
    job: PeerJob, rows: dict[str, Rows], co_rating: bool, by_time: bool
) -> tuple[dict[str, np.ndarray], float]:
    """Return the features of each split, and the seconds that an earlier trial computed them."""
    file = job.rows / f"features{'_co_rating' * co_rating}{'_by_time' * by_time}.npz"
    if file.exists():
        with np.load(file) as arrays:
            return {split: arrays[split] for split in rows}, float(arrays["seconds"])
    start, vectors = time.perf_counter(), item_vectors(job.rows)
    inputs = {
        split: features(split_rows, rows["train"], vectors, co_rating, by_time)
        for split, split_rows in rows.items()
    }
    partial = job.out.with_suffix(".features.npz")
    np.savez(partial, seconds=np.array(time.perf_counter() - start), **inputs)
    partial.rename(file)
    return inputs, 0.0


def main() -> None:
    """Train and score."""
    job = PeerJob.of_command_line()
    rows = job.read()
    start = time.perf_counter()
    settings = {"objective": "binary", "verbosity": -1, "num_threads": 1, "seed": job.seed}
    settings |= {"bagging_freq": 1, "deterministic": True, **job.settings}
    co_rating, by_time = (bool(settings.pop(name, False)) for name in ("co_rating", "by_time"))
    inputs, earlier_seconds = _inputs(job, rows, co_rating, by_time)
    data = lightgbm.Dataset(inputs["train"], rows["train"].label)
    valid = lightgbm.Dataset(inputs["valid"], rows["valid"].label, reference=data)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    model = lightgbm.train(settings, data, MAX_ROUNDS, [valid], callbacks=[stop])
    scores = {split: model.predict(inputs[split]) for split in ("valid", "test")}
    job.write(start - earlier_seconds, **scores)


if __name__ == "__main__":
    main()
