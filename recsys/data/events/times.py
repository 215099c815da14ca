"""Convert times to microseconds since 1970 in UTC; durations such as `7d`; days and hours."""

import re
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc

MICROS = {"us": 1, "ms": 1_000, "s": 1_000_000}
DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
# Times outside of these limits have a wrong unit.
EARLIEST, LATEST = -(2**51), 2**53
# Texts that mean null: empty ones, and MySQL's dates with 00 for an unknown month or day.
UNKNOWN = r"^$|^\d{4}-(00-\d{2}|\d{2}-00)"
HAS_ZONE = r"(Z|z|:[0-9.]+[+-]\d\d(:?\d\d)?)$"
OFFSET = r"(Z|[+-]\d\d(:?\d\d)?)"
WITH_OFFSET = re.compile(r"((?:[^%]|%[^z])*)%z(.*)")  # strptime formats: before %z, after it
HOUR, DAY = DURATIONS["h"] * MICROS["s"], DURATIONS["d"] * MICROS["s"]
EPOCH = date(1970, 1, 1)
EXAMPLE = datetime(2026, 11, 21, 12, tzinfo=UTC)  # a time to try a format with
Period = tuple[str, int, int]  # name, beginning, and end, in microseconds


def now() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


def duration(text: str) -> int | None:
    """Return microseconds of a text such as `90s`, `30m`, `1h`, `7d` or `2w`; None for `all`."""
    if text == "all":
        return None
    match = re.fullmatch(r"([0-9]+)([smhdw])", text)
    if match is None:
        raise ValueError(f"'{text}' is no duration; write a number and s, m, h, d or w, such as 7d")
    micros = int(match[1]) * DURATIONS[match[2]] * MICROS["s"]
    if micros > LATEST:
        raise ValueError(f"'{text}' is longer than any log; set a shorter duration")
    return micros


def moment(text: str, zone: str | None) -> int:
    """Return microseconds of an ISO date or time; a time without an offset is in `zone`."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is no ISO time; write such as 2026-11-01T12:00") from error
    if instant.tzinfo is None:
        if zone is None:
            raise ValueError(
                f"'{text}' has no offset, and the tables have several values of time_zone; write "
                "such as 2026-11-01T00:00+01:00"
            )
        instant = instant.replace(tzinfo=ZoneInfo(zone))
    return (instant - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


class RowError(ValueError):
    """Raised for an unusable value; `row` counts from the first of the converted values."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row}: {problem}")
        self.row, self.problem = row, problem


@dataclass(frozen=True)
class Calendar:
    """Periods of a time zone: days, or the 23 to 25 hours of each day."""

    zone: str
    unit: Literal["day", "hour"]

    def periods(self, day: date) -> list[Period]:
        """Return the periods of a day in order."""
        first, end = (moment(str(start), self.zone) for start in (day, day + timedelta(1)))
        if self.unit == "day":
            return [(str(day), first, end)]
        return [
            (f"{day}/hour={number:02}", begin, min(begin + HOUR, end))
            for number, begin in enumerate(range(first, end, HOUR))
        ]

    def around(self, numbers: list[int]) -> list[Period]:
        """Return the periods of UTC days (days since 1970) and of the days before and after."""
        days = {EPOCH + timedelta(number + shift) for number in numbers for shift in (-1, 0, 1)}
        return [period for day in sorted(days) for period in self.periods(day)]

    def end_of(self, name: str) -> int:
        """Return the end of a day or of an hour such as 2026-11-01/05; a ValueError otherwise."""
        text, _, hour = name.partition("/")
        try:
            periods = self.periods(date.fromisoformat(text))
            return periods[int(hour.removeprefix("hour=")) if hour else -1][2]
        except (ValueError, IndexError) as error:
            form = "2026-11-01" + (" or 2026-11-01/05" if self.unit == "hour" else "")
            raise ValueError(f"--until {name}: no date; write such as {form}") from error

    def last_ended(self, now: int) -> str:
        """Return the name of the last period that has ended at a time."""
        today = now // DAY
        return [name for name, _, end in self.around([today - 1, today]) if end <= now][-1]


def to_micros(values: pa.Array, unit: str, zone: str, form: str | None = None) -> pa.Array:
    """Convert integers, timestamps, dates, or strings, ISO or of format `form`, to int64."""
    kind = values.type
    if pa.types.is_integer(kind):
        if form is not None and EXAMPLE.strftime(form).isdigit():
            raise ValueError(
                f"type {kind}, but time_format is '{form}', whose times may be read as integers, "
                "too; write them as text, or leave time_format out"
            )
        micros = _scaled(values, MICROS[unit])
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micros = _instants(values, zone)
    elif is_text(kind):
        values = pc.if_else(pc.match_substring_regex(values, UNKNOWN), None, values)
        micros = _parsed(values, zone) if form is None else _parsed_by(values, zone, form)
    elif pa.types.is_null(kind):
        return pa.nulls(len(values), pa.int64())
    else:
        raise ValueError(f"type {kind} is no time; write integers, timestamps or ISO strings")
    row = first_row(pc.or_(pc.less(micros, EARLIEST), pc.greater(micros, LATEST)))
    if row is not None:
        fix = f" where time_unit is {unit}; set time_unit to s, ms or us"
        if not pa.types.is_integer(kind):
            fix = "; correct it, or leave it empty"
        raise RowError(row, f"{values[row].as_py()} lies outside the years 1898 to 2255{fix}")
    return micros


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts."""
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def first_row(mask: pa.Array) -> int | None:
    """Return the first row in which a mask is true, or None."""
    row: int = pc.index(mask, True).as_py()
    return row if row >= 0 else None


def _scaled(values: pa.Array, factor: int) -> pa.Array:
    """Multiply values; clip them just beyond the limits of `to_micros` instead of overflowing."""
    limit = LATEST // factor + 1
    try:
        values = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{error}; write integers that fit a signed 64-bit integer") from error
    values = pc.min_element_wise(values, limit, skip_nulls=False)
    return pc.multiply(pc.max_element_wise(values, -limit, skip_nulls=False), factor)


def _instants(values: pa.Array, zone: str) -> pa.Array:
    """Return timestamps as microseconds; timestamps without a zone are in `zone`."""
    if values.type == pa.timestamp("us", "UTC"):
        return values.cast(pa.int64())
    if getattr(values.type, "tz", None) is None:
        # Times that the end of summer time repeats are the earlier ones; skipped times are errors.
        plain = values.cast(pa.timestamp("us"), safe=False)
        try:
            values = pc.assume_timezone(plain, zone, ambiguous="earliest", nonexistent="raise")
        except pa.ArrowInvalid as error:
            raise ValueError(f"{str(error).splitlines()[0]}; correct time_zone") from error
    return values.cast(pa.timestamp("us", "UTC"), safe=False).cast(pa.int64())


def _parsed(values: pa.Array, zone: str) -> pa.Array:
    """Return ISO strings as microseconds."""
    zoned = pc.match_substring_regex(values, HAS_ZONE).fill_null(False)
    instants = []
    try:
        for mask, type_zone in ((zoned, "UTC"), (pc.invert(zoned), None)):
            times = pc.if_else(mask, values, None).cast(pa.timestamp("us", type_zone))
            instants.append(_instants(times, zone))
    except pa.ArrowInvalid as error:
        text = str(error).partition("string: '")[2].rpartition("' as a ")[0]
        row = pc.index(values, pa.scalar(text, values.type)).as_py()
        raise RowError(
            row, f"{error}; write ISO times such as 2026-11-01T12:00:00+01:00, or integers"
        ) from error
    return pc.coalesce(*instants)


def form_problem(form: str) -> str | None:
    """Return an error message if times of a format cannot be read, else None."""
    if "%Z" in form.replace("%%", ""):
        return "names of zones (%Z) are not read; set time_zone, or write offsets (%z)"
    example = pa.array([EXAMPLE.strftime(form)])
    (moment,) = pc.strptime(example, form, "s", error_is_null=True).to_pylist()
    is_dated = moment is not None and (moment.year, moment.month) == (EXAMPLE.year, EXAMPLE.month)
    problem = "its times cannot be read, or have no year and month; write such as %Y-%m-%d %H:%M:%S"
    return None if is_dated else problem


def _parsed_by(values: pa.Array, zone: str, form: str) -> pa.Array:
    """Return strings of a strptime format as microseconds."""
    times = pc.strptime(values, form, "s", error_is_null=True)
    texts, plain_form = values, form  # without an offset, as strftime would write UTC
    if (parts := WITH_OFFSET.fullmatch(form)) is not None:
        plain_form = parts[1] + parts[2]
        pattern = rf"^({_pattern(parts[1])})\s*{OFFSET}({_pattern(parts[2])})$"
        texts = pc.replace_substring_regex(values, pattern, r"\1\4")
    # strptime reads 31 February as a day of March: compare the digits.
    read_again = pc.strftime(pc.strptime(texts, plain_form, "s", error_is_null=True), plain_form)
    is_equal = pc.equal(_digits(texts), _digits(read_again)).fill_null(False)
    is_wrong = pc.or_(pc.is_null(times), pc.invert(is_equal))
    row = first_row(pc.and_(is_wrong, pc.is_valid(values)))
    if row is not None:
        raise RowError(row, f"'{values[row].as_py()}' is no time of the form '{form}'")
    # strptime applies an offset.
    return _instants(times.cast(pa.timestamp("us")), zone if parts is None else "UTC")


def _pattern(form: str) -> str:
    """Return a regular expression of the texts that strptime reads by a part of a format."""

    def pattern(part: re.Match[str]) -> str:
        if part[0].isspace():
            return r"\s*"
        return re.escape(part[0]) if part[0][0] != "%" else "%" if part[0] == "%%" else ".*?"

    return re.sub(r"%%|%[-_0^#]*[EO]?.|\s+|[^%\s]+", pattern, form)


def _digits(texts: pa.Array) -> pa.Array:
    """Return the numbers in texts, without leading zeros."""
    numbers = pc.replace_substring_regex(texts, r"[^0-9]+", " ")
    return pc.utf8_trim(pc.replace_substring_regex(numbers, r"(^| )0+([0-9])", r"\1\2"), " ")
