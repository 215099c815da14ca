"""Item-based collaborative filtering, and a logistic regression on it and other cheap features.

Item-based CF sums the user's values of the last items of the history, times their similarity to the
target by common users (Sarwar et al. 2001). The logistic regression reads that sum, the
dataset's numbers, such as counts of the item, and mean and largest similarity of content.
Shapes: N rows, L history length, I items, K features.
"""

from __future__ import annotations

import time

import numpy as np
from item_similarities import FOLDS, Events, PaddedHistory, folds_of
from peer_rows import PeerJob, Rows, item_vectors
from scipy.optimize import minimize
from scipy.special import expit


def item_cf(
    rows: Rows, events: Events, num_items: int, length: int, significance: float
) -> np.ndarray:  # [N]
    """Return the sum over the history of value times similarity, 1 an item without values."""
    history = PaddedHistory.of_rows(rows, length)
    similarity = events.similarities(num_items, significance)[history.has_values]
    similarity = similarity[rows.item[:, None], history.items] * history.inside
    if not history.has_values:
        return similarity.sum(1)
    mean = (history.stars * history.inside).sum(1) / np.maximum(history.inside.sum(1), 1)
    sums = (similarity * (history.stars - mean[:, None])).sum(1)
    return sums / np.maximum(np.abs(similarity).sum(1), 1e-6)


def features(
    rows: Rows, is_train: bool, events: Events, vectors: list[np.ndarray], length: int, sig: float
) -> np.ndarray:  # [N, K]
    """Return what the logistic regression reads; a training row, CF of other folds."""
    history = PaddedHistory.of_rows(rows, length)
    columns = [np.empty(len(rows))]
    fold = folds_of(rows, events.by_time) if is_train else np.full(len(rows), FOLDS)
    for number in np.unique(fold):
        is_of_fold = fold == number
        training = events.readable_by(number)
        columns[0][is_of_fold] = item_cf(rows, training, len(vectors[0]), length, sig)[is_of_fold]
    for matrix in vectors:
        similarity = (matrix @ matrix.T)[rows.item[:, None], history.items] * history.inside
        columns += [similarity.sum(1) / np.maximum(history.inside.sum(1), 1), similarity.max(1)]
    numbers = [] if rows.numbers is None else [rows.numbers]
    return np.hstack([np.stack(columns, axis=1), *numbers])


def logistic_regression(
    inputs: np.ndarray,  # [N, K]
    labels: np.ndarray,  # [N]
    penalty: float,
) -> np.ndarray:  # [K + 1]
    """Return the weights, the intercept last, with a ridge penalty on the mean loss."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = inputs @ weights[:-1] + weights[-1]
        shrunk = penalty * np.append(weights[:-1], 0)
        error = (expit(logits) - labels) / len(labels)
        gradient = np.append(inputs.T @ error, error.sum()) + shrunk
        return float(
            np.logaddexp(0, logits).mean() - labels @ logits / len(labels) + shrunk @ weights / 2
        ), gradient

    start = np.zeros(inputs.shape[1] + 1)
    return minimize(loss, start, jac=True, method="L-BFGS-B").x


def main() -> None:
    """Train and score."""
    job, start = PeerJob.of_command_line(), time.perf_counter()
    rows, vectors, settings = job.read(), item_vectors(job.rows), job.settings
    events = Events.of_histories(rows["train"], settings.get("by_time", False))
    length, significance = int(settings["length"]), float(settings["significance"])
    if "penalty" not in settings:
        scores = {
            split: item_cf(rows[split], events, len(vectors[0]), length, significance)
            for split in ("valid", "test")
        }
    else:
        inputs = {
            split: features(split_rows, split == "train", events, vectors, length, significance)
            for split, split_rows in rows.items()
        }
        mean, scale = inputs["train"].mean(0), np.maximum(inputs["train"].std(0), 1e-6)
        inputs = {split: (split_inputs - mean) / scale for split, split_inputs in inputs.items()}
        weights = logistic_regression(inputs["train"], rows["train"].label, settings["penalty"])
        scores = {split: inputs[split] @ weights[:-1] for split in ("valid", "test")}
    job.write(start, **scores)


if __name__ == "__main__":
    main()
