"""AUC of rows within groups, and of resamples of users, of pairs that are counted or weighed.

Shapes: N rows, G groups; U users of all windows, S resamples, P positive and M negative rows of a
window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def grouped_auc(
    positive: np.ndarray,  # bool [N]
    score: np.ndarray,  # [N]
    group: np.ndarray,  # [N]
    weight: np.ndarray | None = None,  # float64 [N]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [G], float64 [G], int64 or float64 [G]
    """Compute the AUC within each group that has both labels.

    Twice the number of pairs won, per positive, is 2 · (negatives below) + (negatives equal).

    Args:
        positive: whether the label of each row is 1.
        score: score of each row; higher ranks first.
        group: group of each row.
        weight: weight of each row, above 0: a pair weighs the product of its rows' weights. None:
            1 each, counted in integers.

    Returns:
        The groups with both labels, ascending, the AUC of each, and the sum of its rows' weights.
    """
    order = np.lexsort((score, group))
    of_rows = None if weight is None else weight[order]
    return sorted_auc(positive[order], score[order], group[order], of_rows)


def sorted_auc(
    positive: np.ndarray,  # bool [N]
    score: np.ndarray,  # [N]
    group: np.ndarray,  # [N]
    weight: np.ndarray | None = None,  # float64 [N]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [G], float64 [G], int64 or float64 [G]
    """Compute `grouped_auc` of rows in the order of their groups, and in each of their scores."""
    if len(score) == 0:
        return group, np.zeros(0), np.zeros(0, dtype=np.int64)
    new_group = np.append(True, group[1:] != group[:-1])
    new_tie = np.append(True, score[1:] != score[:-1]) | new_group
    group_begin, tie_begin = np.flatnonzero(new_group), np.flatnonzero(new_tie)

    if weight is None:
        tie_positives = np.add.reduceat(positive, tie_begin, dtype=np.int64)
        tie_negatives = np.diff(np.append(tie_begin, len(score))) - tie_positives
    else:
        tie_positives, tie_negatives = (
            np.add.reduceat(np.where(chosen, weight, 0.0), tie_begin)
            for chosen in (positive, ~positive)
        )
    negatives_before = np.cumsum(tie_negatives) - tie_negatives
    first_tie = np.searchsorted(tie_begin, group_begin)
    ties_in_group = np.diff(np.append(first_tie, len(tie_begin)))
    negatives_below = negatives_before - np.repeat(negatives_before[first_tie], ties_in_group)
    wins = np.add.reduceat(tie_positives * (2 * negatives_below + tie_negatives), first_tie)

    positives, negatives = (
        np.add.reduceat(of_ties, first_tie) for of_ties in (tie_positives, tie_negatives)
    )
    pairs = positives * negatives
    both, rows = pairs > 0, positives + negatives
    return group[group_begin][both], wins[both] / (2 * pairs[both]), rows[both]


@dataclass(frozen=True)
class RankedPairs:
    """Pairs of a positive and a negative row of a window, each with its user's index in U.

    Rows are ranked once, so that AUC of any resample of users is a weighted count.
    """

    positive_users: np.ndarray  # [P]
    negative_users: np.ndarray  # [M], lowest logit first
    below: np.ndarray  # [P], how many negatives have a lower logit
    not_above: np.ndarray  # [P], how many negatives have no higher logit
    positive_weights: np.ndarray | None = None  # [P]; None: 1 each
    negative_weights: np.ndarray | None = None  # [M]

    @classmethod
    def of(
        cls,
        positive: np.ndarray,  # bool [N]
        logit: np.ndarray,  # float [N]
        user: np.ndarray,  # int [N], index in U
        weight: np.ndarray | None = None,  # float [N]
    ) -> RankedPairs:
        """Rank the negative rows of a window and place each positive among them."""
        order = np.argsort(logit[~positive], kind="stable")
        ranked = logit[~positive][order]
        return cls(
            positive_users=user[positive],
            negative_users=user[~positive][order],
            below=np.searchsorted(ranked, logit[positive], side="left"),
            not_above=np.searchsorted(ranked, logit[positive], side="right"),
            positive_weights=None if weight is None else weight[positive],
            negative_weights=None if weight is None else weight[~positive][order],
        )

    def auc(
        self,
        drawn: np.ndarray,  # float64 [U, S], how often each user was drawn
    ) -> tuple[np.ndarray, np.ndarray]:  # float64 [S], [S]
        """Return the AUC (NaN where there is no pair) and the weight of the rows of each resample.

        A row counts as often as its user was drawn, times its weight; a tie counts half.
        """
        positives, drawn_negatives = drawn[self.positive_users], drawn[self.negative_users]
        if self.positive_weights is not None and self.negative_weights is not None:
            positives *= self.positive_weights[:, None]
            drawn_negatives *= self.negative_weights[:, None]
        negatives = np.zeros((len(self.negative_users) + 1, drawn.shape[1]))
        np.cumsum(drawn_negatives, axis=0, out=negatives[1:])
        lost_to = negatives[self.below]
        lost_to += negatives[self.not_above]
        wins = np.einsum("ps,ps->s", positives, lost_to) / 2
        num_positives, num_negatives = positives.sum(axis=0), negatives[-1]
        return ratio(wins, num_positives * num_negatives), num_positives + num_negatives


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:  # [S], [S] -> [S]
    """Return the ratio, NaN where the denominator is 0."""
    undefined = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
