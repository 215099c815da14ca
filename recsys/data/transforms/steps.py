"""The steps of a column's `transform`: a function for each step, by name in `STEPS`.

A step maps N values, or S columns of N values, to N values. Null stays null, except in `fill`. The
keyword arguments are the settings; a `Fit` computes fitted settings from the training rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.vocabulary.fixed import HashVocabulary, is_id_type, mix64

SEPARATOR = "\x1f"  # between crossed values: the ASCII unit separator, which texts do not contain
ZONED_TEXT = r"[T ].*(Z|[+-]\d\d(:?\d\d)?)$"
DATE_TEXT = r"^\d{4}-\d\d-\d\d$"
# Quantiles of more values are computed from a sample of this size, drawn without replacement and
# the same in every run.
SAMPLED = 1 << 22
ROUNDING = 1e-13  # relative rounding error of the mean of equal numbers
Unit = Literal["s", "ms", "us"]
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
END_OF_TIME = 253_402_300_799  # seconds of the last moment of the year 9999


class Moments:
    """Mean and standard deviation, merged batch by batch (Chan et al., 1979)."""

    def __init__(self, **settings: Any) -> None:
        self.num_values = 0
        self.mean = self.squares = 0.0  # squares: sum of squared distances to the mean

    def add(self, values: np.ndarray) -> None:  # float64 [N], finite
        total, mean = self.num_values + len(values), float(values.mean())
        distance = mean - self.mean
        self.squares += float(np.square(values - mean).sum())
        self.squares += distance**2 * self.num_values * len(values) / total
        self.mean += distance * len(values) / total
        self.num_values = total

    def result(self) -> dict[str, Any]:
        deviation = math.sqrt(self.squares / self.num_values)
        is_rounding = deviation <= ROUNDING * abs(self.mean)  # all values are equal
        return {"mean": self.mean, "std": 0.0 if is_rounding else deviation}


class Quantiles:
    """Boundaries of `quantiles` buckets with nearly equal numbers of (sampled) values."""

    def __init__(self, quantiles: int, **settings: Any) -> None:
        self.quantiles, self.num_values = quantiles, 0
        self.values, self.keys = np.zeros(0), np.zeros(0, np.uint64)

    def add(self, values: np.ndarray) -> None:  # float64 [N], finite
        numbers = np.arange(self.num_values, self.num_values + len(values), dtype=np.uint64)
        self.num_values += len(values)
        self.values = np.concatenate([self.values, values])
        self.keys = np.concatenate([self.keys, mix64(numbers)])
        if len(self.keys) > SAMPLED:
            sample = np.argpartition(self.keys, SAMPLED)[:SAMPLED]
            self.values, self.keys = self.values[sample], self.keys[sample]

    def result(self) -> dict[str, Any]:
        shares = np.arange(1, self.quantiles) / self.quantiles
        return {"boundaries": np.unique(np.quantile(self.values, shares)).tolist()}


# Computes settings of one step from values; it is constructed with the step's other settings.
Fit = Moments | Quantiles


@dataclass(frozen=True)
class Step:
    """One step; its functions take the settings as keyword arguments."""

    apply: Callable[..., pa.Array]  # maps values [N] to values [N]; or S columns, if `joins` is set
    num_ids: Callable[..., int] | None = None  # number of ids that the step returns, if known
    joins: bool = False
    fit: Callable[..., Fit] | None = None  # computes the settings `fitted` from all training rows
    fitted: tuple[str, ...] = ()


def fill(values: pa.Array, value: int | float | str) -> pa.Array:
    """Replace null by `value`, which must fit the type of the column."""
    filler = pa.scalar(value)
    if pa.types.is_null(values.type):
        return values.cast(filler.type).fill_null(filler)
    if isinstance(value, str) == is_number(values.type):  # times are filled with text
        raise ValueError(f"value {value!r} is none of type {values.type}")
    try:
        if pa.types.is_boolean(values.type) and value not in (0, 1):
            raise pa.ArrowInvalid("a cast makes it true")
        filler = filler.cast(values.type)
        return values.fill_null(filler) if values.null_count else values
    except pa.ArrowInvalid as error:
        raise ValueError(f"value {value!r} does not fit type {values.type}") from error


def clip(values: pa.Array, low: float | None = None, high: float | None = None) -> pa.Array:
    """Replace values below `low` by `low` and those above `high` by `high`."""
    if low is None and high is None:
        raise ValueError("needs low or high")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low is {low}, above high, {high}; swap them")
    values = _numbers(values)
    if low is not None:
        values = pc.max_element_wise(values, low, skip_nulls=False)
    return values if high is None else pc.min_element_wise(values, high, skip_nulls=False)


def log1p(values: pa.Array) -> pa.Array:
    """Return log(1 + x), null for x of -1 or less."""
    values = _numbers(values)
    return pc.if_else(pc.greater(values, -1.0), pc.log1p(values), pa.scalar(None, pa.float64()))


def standardize(values: pa.Array, mean: float | None = None, std: float | None = None) -> pa.Array:
    """Subtract the mean of the training rows and divide by their deviation, unless that is 0."""
    if (mean is None) != (std is None) or (std is not None and std < 0):
        raise ValueError(f"mean is {mean} and std is {std}; give both or none, and std from 0 on")
    return pc.divide(pc.subtract(_numbers(values), mean or 0.0), std or 1.0)


def bucketize(
    values: pa.Array, boundaries: list[float] | None = None, quantiles: int | None = None
) -> pa.Array:
    """Return the bucket of each value, the number of boundaries at or below it."""
    if boundaries is None and quantiles is None:
        raise ValueError("needs boundaries, or a number of quantiles to fit them")
    if quantiles is not None and not 2 <= quantiles <= 100_000:
        raise ValueError(f"quantiles is {quantiles}; set 2 to 100000")
    bounds = np.array(boundaries or [], np.float64)
    if not (np.diff(bounds) > 0).all():
        raise ValueError(f"boundaries are {boundaries}; sort them, each once")
    if quantiles is None:  # fitted boundaries are already rounded like values of files
        bounds = limits_in_float32(bounds)
    values = _numbers(values)
    buckets = np.searchsorted(bounds, values.fill_null(0).to_numpy(False), side="right")
    return _with_nulls(buckets, values)


def limits_in_float32(limits: np.ndarray) -> np.ndarray:  # float64 [N] -> float64 [N]
    """Return the smaller of each limit and its value rounded to float32; integers are unchanged.

    Values are read as float32, in which 0.7 is less than a limit of 0.7 in the settings.
    """
    with np.errstate(over="ignore"):
        rounded = limits.astype(np.float32).astype(np.float64)
    is_exact = (limits == np.trunc(limits)) | (rounded == 0)
    return np.where(is_exact, limits, np.minimum(limits, rounded))


def hash_ids(values: pa.Array, buckets: int, seed: int = 0) -> pa.Array:
    """Return an id below `buckets` for each integer or string, by a stable hash."""
    vocabulary = HashVocabulary(buckets, seed=seed)
    if pa.types.is_null(values.type):
        return values.cast(pa.int64())
    if not is_id_type(values.type):
        raise ValueError(f"takes integers or strings, not {values.type}")
    rows = np.zeros(len(values), np.int64)
    rows[values.is_valid().to_numpy(False)] = vocabulary.rows_of(values.drop_null())[:, 0]
    return _with_nulls(rows, values)


def cross(columns: Sequence[pa.Array]) -> pa.Array:
    """Return a string for each combination of values; null if one of the values is null."""
    for values in columns:
        kind = values.type
        if not (is_id_type(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            raise ValueError(f"takes integers and strings, not {kind}; bucketize it first")
    texts = [values.cast(pa.large_string()) for values in columns]
    return pc.binary_join_element_wise(*texts, pa.scalar(SEPARATOR, pa.large_string()))


def lower(values: pa.Array) -> pa.Array:
    """Return strings in lower case."""
    if not _is_text(values.type) and not pa.types.is_null(values.type):
        raise ValueError(f"takes strings, not {values.type}")
    return pc.utf8_lower(values.cast(pa.large_string()))


def _of_moment(component: Callable[[pa.Array], pa.Array]) -> Callable[..., pa.Array]:
    """Return the step that computes a component, counted from 0, of a time or date in a zone."""

    def step(values: pa.Array, zone: str = "UTC", unit: Unit = "s") -> pa.Array:
        return component(_moments(values, zone, unit))

    return step


STEPS: dict[str, Step] = {
    "fill": Step(fill),
    "clip": Step(clip),
    "log1p": Step(log1p),
    "standardize": Step(standardize, fit=Moments, fitted=("mean", "std")),
    "bucketize": Step(
        bucketize,
        lambda boundaries, quantiles: quantiles or len(boundaries or []) + 1,
        fit=Quantiles,
        fitted=("boundaries",),
    ),
    "hash": Step(hash_ids, lambda buckets, seed: buckets),
    "cross": Step(cross, joins=True),
    "lower": Step(lower),
    "hour": Step(_of_moment(pc.hour), lambda zone, unit: 24),
    "weekday": Step(_of_moment(pc.day_of_week), lambda zone, unit: 7),  # 0: Monday
    "day_of_year": Step(
        _of_moment(lambda moments: pc.subtract(pc.day_of_year(moments), 1)),
        lambda zone, unit: 366,
    ),
}


def is_number(kind: pa.DataType) -> bool:
    """Return whether a column of this type has numbers; booleans count as 0 and 1."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _is_text(kind: pa.DataType) -> bool:
    return is_id_type(kind) and not pa.types.is_integer(kind)


def _numbers(values: pa.Array) -> pa.Array:
    if not is_number(values.type) and not pa.types.is_null(values.type):
        raise ValueError(f"takes numbers, not {values.type}")
    return values.cast(pa.float64(), safe=False)


def _with_nulls(numbers: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.array(numbers.astype(np.int64), mask=values.is_null().to_numpy(False))


def _moments(values: pa.Array, zone: str, unit: Unit) -> pa.Array:
    """Return local times in a zone; integers and times without a zone are UTC, dates stay."""
    kind = values.type
    try:
        pc.assume_timezone(pa.array([0], pa.timestamp("us")), zone)
    except pa.ArrowInvalid as error:
        raise ValueError(f"zone '{zone}' is unknown; name one such as Europe/Berlin") from error
    if pa.types.is_date(kind):
        return values.cast(pa.timestamp("ms"))
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        values = values.cast(pa.int64())
        for end in filter(None, pc.min_max(values).as_py().values()):
            if abs(end) > END_OF_TIME * UNITS[unit]:
                raise ValueError(
                    f"takes times; {end} lies beyond the year 9999 where unit is {unit}; set unit "
                    "to s, ms or us"
                )
        values = values.cast(pa.timestamp(unit))
    elif _is_text(kind):
        return _local_times(values.cast(pa.string()), zone)
    elif not pa.types.is_timestamp(kind):
        raise ValueError(f"takes times, not {kind}")
    if values.type.tz is None:
        values = pc.assume_timezone(values, "UTC")
    return pc.local_timestamp(values.cast(pa.timestamp(values.type.unit, zone)))


def _local_times(texts: pa.Array, zone: str) -> pa.Array:
    """Return ISO 8601 texts as local times in a zone; a date without a time stays that date."""
    is_zoned, none = pc.match_substring_regex(texts, ZONED_TEXT), pa.scalar(None, pa.string())
    is_date = pc.match_substring_regex(texts, DATE_TEXT)
    try:
        zoned = pc.if_else(is_zoned, texts, none).cast(pa.timestamp("us", "UTC"))
        unzoned = pc.if_else(is_zoned, none, texts).cast(pa.timestamp("us"))
    except pa.ArrowInvalid as error:
        raise ValueError(f"takes times; {error}") from error
    moments = pc.coalesce(zoned, pc.assume_timezone(unzoned, "UTC"))
    return pc.if_else(is_date, unzoned, pc.local_timestamp(moments.cast(pa.timestamp("us", zone))))
