"""Intervals of few users against Student's and Hall's, and how often they exclude the truth."""

import numpy as np
import pytest
from scipy import stats

from recsys.evaluation.few_users import effective_users, interval_ends, interval_stretch

SETS = 2000
# Differences of users, of mean 0 and variance 1.
DISTRIBUTIONS = {
    "normal": lambda random, shape: random.normal(size=shape),
    "heavy tails": lambda random, shape: random.standard_t(3, size=shape) / np.sqrt(3),
    "skewed": lambda random, shape: random.exponential(size=shape) - 1,
}


def test_users_of_unlike_weight_count_as_fewer() -> None:
    assert effective_users(np.array([10, 0, 0, 10])) == 2
    assert interval_stretch(300) < 1.01 < 1.05 < interval_stretch(30) < 1.1
    assert interval_stretch(5) == pytest.approx(2.7764 / 1.96 * 1.118, 1e-3)


def test_without_skewness_the_interval_is_that_of_student_and_percentiles() -> None:
    deviations = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    low, high = interval_ends(deviations, 10)
    assert high == pytest.approx(-low) == pytest.approx(2.262 * np.sqrt(10 / 9), rel=0.01)
    assert interval_ends(np.zeros(50), 10) == (0, 0)
    bounded = np.repeat([-1.0, 1.0], 1000)  # percentiles are within, Student's is beyond
    assert interval_ends(bounded, 1000)[1] == pytest.approx(1.963, abs=1e-2)


def test_a_skewed_mean_has_the_longer_side_of_hall_s_transformation() -> None:
    deviations = stats.gamma(a=36).ppf((np.arange(4000) + 0.5) / 4000) - 36  # skewness 1 / 3
    skewness = stats.skew(deviations)
    skewness *= skewness**2 / (skewness**2 + 6 / 20**2 + 6 / 4000)
    quantile = stats.t(19).ppf(0.975)

    def transformed(t: float) -> float:
        return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6

    low, high = interval_ends(deviations, 20)
    error = deviations.std() * np.sqrt(20 / 19)
    assert transformed(-high / error) == pytest.approx(-quantile)
    assert low == pytest.approx(-quantile * error)
    assert interval_ends(-deviations, 20) == pytest.approx((-high, -low))
    # Where the transformation is flat its end is no farther than that of the percentiles.
    deviations = stats.expon.ppf((np.arange(4000) + 0.5) / 4000) - 1
    percentile = np.percentile(deviations, 97.5)
    assert interval_ends(deviations, 20)[1] == pytest.approx(percentile * interval_stretch(20))


def share_apart(name: str, num_users: int, shift: float = 0.0) -> float:
    """The share of sets of users whose interval excludes 0."""
    random = np.random.default_rng(num_users)
    differences = DISTRIBUTIONS[name](random, (num_users, SETS)) + shift
    counts = random.multinomial(num_users, np.full(num_users, 1 / num_users), size=500)
    means = differences.mean(axis=0)
    resampled = counts @ differences / num_users - means  # [S, SETS]
    ends = np.array([interval_ends(of_set, num_users) for of_set in resampled.T])
    return float(((means + ends[:, 0] > 0) | (means + ends[:, 1] < 0)).mean())


@pytest.mark.parametrize("num_users", [10, 20, 50])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_users_without_a_difference_show_one_in_about_one_of_twenty_sets(
    name: str, num_users: int
) -> None:
    """Without correction of skewness one shows in 8.2 % of the skewed sets of 10 users."""
    assert 0.02 < share_apart(name, num_users) < 0.068  # 0.005 is a standard deviation


@pytest.mark.parametrize(("num_users", "least"), [(5, 0.5), (10, 0.67), (20, 0.75)])
def test_a_difference_of_three_standard_errors_is_still_seen(num_users: int, least: float) -> None:
    """Without correction of skewness 60 %, 73 % and 80 % of them are seen."""
    for sign in (1, -1):
        assert share_apart("normal", num_users, sign * 3 / np.sqrt(num_users)) > least
