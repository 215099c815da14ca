"""Widen the intervals of few users, and mark figures that rest on a handful of them.

Percentile intervals of a bootstrap over U users are too narrow by sqrt((U - 1) / U), and treat as
known a variance that U users only estimate: with 5 users they exclude 0 for 17 % of pairs of models
that are equally good, not for 5 %. Widened by both factors of Student's interval they exclude it
for about 5 %: Hesterberg, What Teachers Should Know about the Bootstrap, The American Statistician
69, 2015.
Users of unequal weight count as fewer users of equal weight: Kish, Survey Sampling, 1965.

If a few users gain much and many lose little, the mean is skewed, and such an interval of 10
users excludes 0 for 8 % to 15 % of such pairs. So the longer side is widened by the transformation
of Hall, On the Removal of Skewness by Transformation, Journal of the Royal Statistical Society B
54, 1992. Then the share is 6 % to 12 %, and 5 % to 8 % with 20 users.

Shapes: U users, S resamples.
"""

from __future__ import annotations

import numpy as np

LEAST_USERS = 5  # with fewer there is no interval, and figures are marked
MARK_NOTE = f"Figures in parentheses rest on fewer than {LEAST_USERS} users."
CONFIDENCE = 0.95
PERCENTILES = (2.5, 97.5)


def effective_users(weights: np.ndarray) -> float:  # weights: [U]
    """Return the number of users of equal weight that vary as much as users of these weights.

    Example::

        effective_users(np.array([1, 1, 2]))  # 2.67
    """
    weights = weights.astype(np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def interval_stretch(users: float) -> float:
    """Return the factor that widens a percentile interval of a bootstrap to its nominal level.

    Args:
        users: effective number of users; below 2 the factor is that of 2.

    Example::

        interval_stretch(5)  # 1.58
        interval_stretch(300)  # 1.01
    """
    from scipy.special import ndtri, stdtrit

    users, upper = max(users, 2.0), (1 + CONFIDENCE) / 2
    return float(stdtrit(users - 1, upper) / ndtri(upper) * np.sqrt(users / (users - 1)))


def interval_ends(deviations: np.ndarray, users: float) -> tuple[float, float]:  # deviations: [S]
    """Return how far a 95 % interval reaches below and above a value, from a bootstrap of users.

    Each end is the farthest of three: the stretched percentile, Student's, and Student's corrected
    for the skewness of the resamples.

    Args:
        deviations: metric in each resample minus the metric of all users.
        users: effective number of users; fewer than 2 count as 2.
    """
    from scipy.special import stdtrit

    users = max(users, 2.0)
    low, high = np.percentile(deviations, PERCENTILES) * interval_stretch(users)
    quantile = float(stdtrit(users - 1, (1 + CONFIDENCE) / 2))
    error = deviations.std() * np.sqrt(users / (users - 1))
    skewness = _skewness(deviations, users)
    below, above = (error * max(quantile, _unskewed(quantile, of)) for of in (skewness, -skewness))
    return float(min(low, -below)), float(max(high, above))


def _skewness(deviations: np.ndarray, users: float) -> float:
    """Return the skewness of the resamples, reduced by the share that chance can explain."""
    centred = deviations - deviations.mean()
    variance = (centred**2).mean()
    if variance == 0:
        return 0.0
    skewness = (centred**3).mean() / variance**1.5
    by_chance = 6 / users**2 + 6 / len(deviations)  # its variance for normal users and resamples
    return float(skewness**3 / (skewness**2 + by_chance))


def _unskewed(quantile: float, skewness: float) -> float:
    """Return what Hall's transformation maps to the quantile, up to where it is flat."""
    if abs(skewness) < 1e-6:
        return quantile
    root = np.cbrt(max(0.0, 1 + skewness * (quantile - skewness / 6)))
    return float(3 / skewness * (root - 1))


def marked(figure: str, num_users: int | None) -> str:
    """Put a figure in parentheses if fewer than `LEAST_USERS` users define it; a dash stays.

    `num_users` is None if it is not known, as for reports of earlier versions.
    """
    few = num_users is not None and num_users < LEAST_USERS and figure not in ("-", "–")
    return f"({figure})" if few else figure
