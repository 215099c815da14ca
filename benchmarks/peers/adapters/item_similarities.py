"""Features of a peer by the similarity of the target to its history.

Co-rating statistics count the distinct events in the histories of training rows. A training row
reads those of users in other folds or, `by_time`, of the rows in earlier blocks: rows are in order.
Shapes: N rows, L history length, I items, E events, K features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from peer_rows import Rows
from scipy.sparse import csr_matrix, diags

NEAREST = (1, 5, 20)
LATEST = 5
FOLDS = 5
PRIOR = 5.0  # ratings that a mean is shrunk by
SIGNIFICANCE = 20.0  # similarities are multiplied by n / (n + this), n the users of both


@dataclass(frozen=True)
class PaddedHistory:
    """The last items of each row, zeros before them: [N, L] each."""

    items: np.ndarray
    inside: np.ndarray  # bool
    liked: np.ndarray
    stars: np.ndarray
    has_values: bool  # whether stars differ; in a log without them each item counts as 1

    @staticmethod
    def of_rows(rows: Rows, length: int) -> PaddedHistory:
        inside = rows.padded(np.ones(len(rows.history)), length) > 0
        columns = (rows.history, rows.parallel["history_liked"], rows.parallel["history_stars"])
        items, liked, stars = (rows.padded(column, length) for column in columns)
        return PaddedHistory(items, inside, liked, stars, bool(np.ptp(columns[2])))

    def take(self, rows: np.ndarray) -> PaddedHistory:
        columns = (self.items, self.inside, self.liked, self.stars)
        return PaddedHistory(*(column[rows] for column in columns), self.has_values)


def similarity_features(
    similarity: np.ndarray,  # [N, L]
    history: PaddedHistory,
) -> np.ndarray:  # [N, K]
    """Return similarities to the history, and what its most similar items say of the target."""
    similarity = similarity * history.inside
    mean = (history.stars * history.inside).sum(1) / np.maximum(history.inside.sum(1), 1)
    deviation = (history.stars - mean[:, None] * history.has_values) * history.inside
    columns = []
    for mask in (history.inside & (history.liked > 0), history.inside & (history.liked <= 0)):
        weight = mask / np.maximum(mask.sum(1), 1)[:, None]
        columns += [(similarity * weight).sum(1), np.where(mask, similarity, 0).max(1)]
    latest = np.where(history.inside, similarity, 0)[:, -LATEST:]
    columns += [latest.sum(1) / np.maximum(history.inside[:, -LATEST:].sum(1), 1), latest.max(1)]
    order = np.argsort(-similarity, axis=1)[:, : max(NEAREST)]
    nearest = np.maximum(np.take_along_axis(similarity, order, 1), 0)
    nearest_deviation = np.take_along_axis(deviation, order, 1)
    for count in NEAREST:
        total = np.maximum(nearest[:, :count].sum(1), 1e-6) if history.has_values else count
        columns.append((nearest[:, :count] * nearest_deviation[:, :count]).sum(1) / total)
    columns.append((np.maximum(similarity, 0) ** 4 * deviation).sum(1))
    columns.append((similarity * deviation).sum(1) / np.sqrt(history.inside.sum(1) + 1))
    return np.stack(columns, axis=1)


def folds_of(train: Rows, by_time: bool) -> np.ndarray:  # int64 [N]
    """Return the block of each training row, or the fold of its user."""
    return np.arange(len(train)) * FOLDS // len(train) if by_time else train.user % FOLDS


@dataclass(frozen=True)
class Events:
    """Distinct pairs of user and item, with stars less their mean: [E] each."""

    user: np.ndarray
    item: np.ndarray
    stars: np.ndarray
    fold: np.ndarray  # of the user, or the block of the first row
    by_time: bool = False

    @staticmethod
    def of_histories(rows: Rows, by_time: bool = False) -> Events:
        """Return each user's items once, whatever the number of his rows."""
        lengths = np.diff(rows.offsets)
        pairs = np.stack([np.repeat(rows.user, lengths), rows.history], axis=1)
        pairs, first = np.unique(pairs, axis=0, return_index=True)
        stars = rows.parallel["history_stars"][first].astype(np.float64)
        fold = np.repeat(folds_of(rows, by_time), lengths)[first]
        return Events(pairs[:, 0], pairs[:, 1], stars - stars.mean(), fold, by_time)

    def readable_by(self, fold: int) -> Events:
        """Return the events that training rows of a fold read; all for `FOLDS`."""
        is_read = self.fold < fold if self.by_time else self.fold != fold
        columns = (self.user, self.item, self.stars, self.fold)
        return Events(*(column[is_read] for column in columns), self.by_time)

    @property
    def deviation(self) -> np.ndarray:  # [E]
        """The stars less the user's mean of these events."""
        _, user_index = np.unique(self.user, return_inverse=True)
        mean = np.bincount(user_index, self.stars) / (np.bincount(user_index) + PRIOR)
        return self.stars - mean[user_index]

    def similarities(
        self, num_items: int, significance: float = SIGNIFICANCE
    ) -> list[np.ndarray]:  # float32 [I, I] each
        """Return the cosines of items by their users, and by the users' deviations."""
        shape = num_items, int(self.user.max(initial=0)) + 1
        raters = csr_matrix((np.ones(len(self.user)), (self.item, self.user)), shape=shape)
        ratings = csr_matrix((self.deviation, (self.item, self.user)), shape=shape)
        common = (raters @ raters.T).toarray().astype(np.float32)
        weight = common / np.maximum(common + significance, 1)
        cosines = []
        for vectors in (raters, ratings):
            squares = np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel()
            unit = diags(1 / np.sqrt(np.maximum(squares, 1e-6))) @ vectors
            cosines.append((unit @ unit.T).toarray().astype(np.float32) * weight)
        return cosines

    def target_features(self, target: np.ndarray, num_items: int) -> np.ndarray:  # [N, 2]
        """Return the number of the target's ratings, and their mean deviation."""
        count = np.bincount(self.item, minlength=num_items)[target]
        total = np.bincount(self.item, self.deviation, num_items)[target]
        return np.stack([np.log1p(count), total / (count + PRIOR)], axis=1)


def item_statistics(
    rows: Rows, train: Rows, prior: float, by_time: bool = False
) -> np.ndarray:  # [N, 2]
    """Return the training rows of each row's item, and their mean label with `prior` mean rows.

    Those of a training row are of other folds. If only the row itself was left out, an item's rows
    would have a lower mean for a label of 1 than of 0, and trees would learn that.
    """
    size, fold = int(max(rows.item.max(), train.item.max())) + 1, folds_of(train, by_time)
    sums = []
    for weights in (None, train.label):
        by_fold = np.bincount(fold * size + train.item, weights, FOLDS * size).reshape(FOLDS, size)
        total = by_fold.sum(0).astype(np.float64)
        readable = by_fold.cumsum(0) - by_fold if by_time else total - by_fold
        sums.append(readable[fold, train.item] if rows is train else total[rows.item])
    row_counts, label_sums = sums
    mean = (label_sums + prior * train.label.mean()) / (row_counts + prior)
    return np.stack([np.log1p(row_counts), mean], axis=1)


def co_rating_features(
    rows: Rows, history: PaddedHistory, train: Rows, num_items: int, by_time: bool = False
) -> np.ndarray:  # [N, K]
    """Return features by the users who rated both items, and the target's ratings."""
    events = Events.of_histories(train, by_time)
    fold = folds_of(rows, by_time) if rows is train else np.full(len(rows), FOLDS)
    blocks, row_indices = [], []
    for number in np.unique(fold):
        subset, row_index = events.readable_by(number), np.flatnonzero(fold == number)
        fold_history, target = history.take(row_index), rows.item[row_index]
        similarities = [
            similarity_features(cosines[target[:, None], fold_history.items], fold_history)
            for cosines in subset.similarities(num_items)
        ]
        blocks.append(np.hstack([subset.target_features(target, num_items), *similarities]))
        row_indices.append(row_index)
    return np.concatenate(blocks)[np.argsort(np.concatenate(row_indices))]
