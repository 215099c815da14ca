"""Widen bootstrap intervals of few users, which exclude 0 too often: 17 % for 5 users, not 5 %.

Hesterberg, American Statistician 69, 2015; Kish 1965; Hall, JRSS B 54, 1992. Shapes: U users,
S resamples.
"""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.95
PERCENTILES = (2.5, 97.5)


def effective_users(weights: np.ndarray) -> float:  # weights: [U]
    """Return the number of users of equal weight that vary as much as users of these weights."""
    weights = weights.astype(np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def interval_stretch(users: float) -> float:
    """Return the factor that widens a percentile interval, for effective users: 1.58 for 5."""
    from scipy.special import ndtri, stdtrit

    users, upper = max(users, 2.0), (1 + CONFIDENCE) / 2
    return float(stdtrit(users - 1, upper) / ndtri(upper) * np.sqrt(users / (users - 1)))


def interval_ends(deviations: np.ndarray, users: float) -> tuple[float, float]:  # deviations: [S]
    """Return how far a 95 % interval reaches below and above a value, from a bootstrap of users.

    `deviations` are the metric in each resample minus that of all users.
    """
    from scipy.special import stdtrit

    users = max(users, 2.0)
    low, high = np.percentile(deviations, PERCENTILES) * interval_stretch(users)
    quantile = float(stdtrit(users - 1, (1 + CONFIDENCE) / 2))
    error = deviations.std() * np.sqrt(users / (users - 1))
    skewness = _skewness(deviations, users)
    below, above = (
        error * max(quantile, _unskewed(quantile, signed)) for signed in (skewness, -skewness)
    )
    return float(min(low, -below)), float(max(high, above))


def _skewness(deviations: np.ndarray, users: float) -> float:
    """Return the skewness of the resamples, less what chance can explain."""
    centred = deviations - deviations.mean()
    variance = (centred**2).mean()
    if variance == 0:
        return 0.0
    skewness = (centred**3).mean() / variance**1.5
    chance_variance = 6 / users**2 + 6 / len(deviations)  # for normal users and resamples
    return float(skewness**3 / (skewness**2 + chance_variance))


def _unskewed(quantile: float, skewness: float) -> float:
    """Return what Hall's transformation maps to the quantile, up to where it is flat."""
    if abs(skewness) < 1e-6:
        return quantile
    root = np.cbrt(max(0.0, 1 + skewness * (quantile - skewness / 6)))
    return float(3 / skewness * (root - 1))
