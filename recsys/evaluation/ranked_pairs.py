"""Ranks a window's rows once, so that AUC of any resample of its users is a weighted count.

Shapes: U users of all windows, S resamples, N rows, P positive and M negative rows of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankedPairs:
    """Pairs of a positive and a negative row of a window, each with its user's index in U."""

    positive_users: np.ndarray  # [P]
    negative_users: np.ndarray  # [M], lowest logit first
    below: np.ndarray  # [P], how many negatives have a lower logit
    not_above: np.ndarray  # [P], how many negatives have no higher logit

    @classmethod
    def of(
        cls,
        positive: np.ndarray,  # bool [N]
        logit: np.ndarray,  # float [N]
        user: np.ndarray,  # int [N], index in U
    ) -> RankedPairs:
        """Rank the negative rows of a window and place each positive among them."""
        order = np.argsort(logit[~positive], kind="stable")
        ranked = logit[~positive][order]
        return cls(
            positive_users=user[positive],
            negative_users=user[~positive][order],
            below=np.searchsorted(ranked, logit[positive], side="left"),
            not_above=np.searchsorted(ranked, logit[positive], side="right"),
        )

    def auc(
        self,
        drawn: np.ndarray,  # float64 [U, S], how often each user was drawn
    ) -> tuple[np.ndarray, np.ndarray]:  # float64 [S], [S]
        """Return the AUC (NaN where there is no pair) and the number of rows of each resample.

        A row counts as often as its user was drawn; a tie counts half.
        """
        positives = drawn[self.positive_users]
        negatives = np.zeros((len(self.negative_users) + 1, drawn.shape[1]))
        np.cumsum(drawn[self.negative_users], axis=0, out=negatives[1:])
        lost_to = negatives[self.below]
        lost_to += negatives[self.not_above]
        wins = np.einsum("ps,ps->s", positives, lost_to) / 2
        num_positives, num_negatives = positives.sum(axis=0), negatives[-1]
        return ratio(wins, num_positives * num_negatives), num_positives + num_negatives


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:  # [S], [S] -> [S]
    """Return the ratio, NaN where the denominator is 0."""
    undefined = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
