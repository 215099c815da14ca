"""Features of a peer by the similarity of the target to its history.

Co-rating statistics count the distinct events in the histories of training rows. A training row
reads the statistics of users in other folds.
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
        columns = (rows.history, rows.beside["history_liked"], rows.beside["history_stars"])
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
    near = np.maximum(np.take_along_axis(similarity, order, 1), 0)
    near_deviation = np.take_along_axis(deviation, order, 1)
    for count in NEAREST:
        total = np.maximum(near[:, :count].sum(1), 1e-6) if history.has_values else count
        columns.append((near[:, :count] * near_deviation[:, :count]).sum(1) / total)
    columns.append((np.maximum(similarity, 0) ** 4 * deviation).sum(1))
    columns.append((similarity * deviation).sum(1) / np.sqrt(history.inside.sum(1) + 1))
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Events:
    """Distinct pairs of user and item, with stars less the user's mean: [E] each."""

    user: np.ndarray
    item: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of_histories(rows: Rows) -> Events:
        """Return each user's items once, whatever the number of his rows."""
        user = np.repeat(rows.user, np.diff(rows.offsets))
        pairs = np.stack([user, rows.history], axis=1)
        pairs, first = np.unique(pairs, axis=0, return_index=True)
        stars = rows.beside["history_stars"][first].astype(np.float64)
        stars = stars - stars.mean()
        _, place = np.unique(pairs[:, 0], return_inverse=True)
        mean = np.bincount(place, stars) / (np.bincount(place) + PRIOR)
        return Events(pairs[:, 0], pairs[:, 1], stars - mean[place])

    def without_fold(self, fold: int) -> Events:
        is_outside = self.user % FOLDS != fold
        return Events(self.user[is_outside], self.item[is_outside], self.deviation[is_outside])

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


def item_statistics(rows: Rows, train: Rows, prior: float) -> np.ndarray:  # [N, 2]
    """Return the training rows of each row's item, and their mean label with `prior` mean rows.

    Those of a training row are of users of other folds. If only the row itself was left out, an
    item's rows would have a lower mean for a label of 1 than of 0, and trees would learn that.
    """
    size = int(max(rows.item.max(), train.item.max())) + 1
    cell = train.user % FOLDS * size + train.item
    counts = np.bincount(cell, minlength=FOLDS * size).astype(np.float64)
    positive = np.bincount(cell, train.label, FOLDS * size)
    row_counts, label_sums = (
        sums.reshape(FOLDS, size).sum(0)[rows.item] for sums in (counts, positive)
    )
    if rows is train:
        row_counts, label_sums = row_counts - counts[cell], label_sums - positive[cell]
    mean = (label_sums + prior * train.label.mean()) / (row_counts + prior)
    return np.stack([np.log1p(row_counts), mean], axis=1)


def co_rating_features(
    rows: Rows, history: PaddedHistory, train: Rows, num_items: int
) -> np.ndarray:  # [N, K]
    """Return features by the users who rated both items, and the target's ratings."""
    events = Events.of_histories(train)
    fold = rows.user % FOLDS if rows is train else np.full(len(rows), FOLDS)
    blocks, places = [], []
    for number in np.unique(fold):
        other_folds, place = events.without_fold(number), np.flatnonzero(fold == number)
        part, target = history.take(place), rows.item[place]
        similarities = [
            similarity_features(cosines[target[:, None], part.items], part)
            for cosines in other_folds.similarities(num_items)
        ]
        blocks.append(np.hstack([other_folds.target_features(target, num_items), *similarities]))
        places.append(place)
    return np.concatenate(blocks)[np.argsort(np.concatenate(places))]
