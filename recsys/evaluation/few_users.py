"""Widens the intervals of few users, and marks figures that rest on a handful of them.

The percentiles of a bootstrap over U users are narrow by sqrt((U - 1) / U), and take a spread for
known that U users only estimate: with 5 users they exclude 0 for 17 % of pairs of models that are
alike, not 5 %. Stretched by both factors of Student's interval they exclude it for about 5 %:
Hesterberg, What Teachers Should Know about the Bootstrap, The American Statistician 69, 2015. Users
of unlike weight count as fewer users of equal weight: Kish, Survey Sampling, 1965.

Shapes: U users.
"""

from __future__ import annotations

import numpy as np

LEAST_USERS = 5  # fewer have no interval, and their figures are marked
MARK_NOTE = f"Figures in parentheses rest on fewer than {LEAST_USERS} users."
CONFIDENCE = 0.95


def effective_users(
    weights: np.ndarray,  # [U]
) -> float:
    """Return how many users of equal weight vary as much as users of these weights.

    Example::

        effective_users(np.array([1, 1, 2]))  # 2.67
    """
    weights = weights.astype(np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def interval_stretch(users: float) -> float:
    """Return the factor from a percentile interval of a bootstrap to one that holds its level.

    Args:
        users: effective number of users; below 2 the factor is that of 2.

    Example::

        interval_stretch(5)  # 1.58
        interval_stretch(300)  # 1.01
    """
    from scipy.special import ndtri, stdtrit

    users, upper = max(users, 2.0), (1 + CONFIDENCE) / 2
    return float(stdtrit(users - 1, upper) / ndtri(upper) * np.sqrt(users / (users - 1)))


def marked(figure: str, num_users: int | None) -> str:
    """Put a figure in parentheses if fewer than `LEAST_USERS` users define it.

    Args:
        figure: a number as text, or a dash where it is not defined.
        num_users: None if it is not known, as for reports of earlier versions.
    """
    few = num_users is not None and num_users < LEAST_USERS and figure not in ("-", "–")
    return f"({figure})" if few else figure
