"""Times of any form as microseconds since 1970 in UTC, and durations such as `7d`.

Shapes: N values.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc

MICROS = {"us": 1, "ms": 1_000, "s": 1_000_000}
DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
# Beyond these the unit is wrong.
EARLIEST, LATEST = -(2**51), 2**53
UNKNOWN = r"^$|^\d{4}-(00-\d{2}|\d{2}-00)"  # 00 of what is unknown, as MySQL writes it
HAS_ZONE = r"(Z|z|:[0-9.]+[+-]\d\d(:?\d\d)?)$"


def duration(text: str) -> int | None:
    """Return microseconds of a text such as `90s`, `30m`, `1h`, `7d` or `2w`; None of `all`."""
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
    """Return microseconds of an ISO date or time; without an offset it is in `zone`."""
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


def latest_moment(later_than: str | None, zone: str | None) -> int:
    """Return microseconds of the time after which no event counts: now, if none is set."""
    return time.time_ns() // 1000 if later_than is None else moment(later_than, zone)


def to_micros(values: pa.Array, unit: str, zone: str, form: str | None = None) -> pa.Array:
    """Convert N integers, timestamps, dates, or strings, ISO or of a form, to int64.

    Null stays. Null are an empty text, too, as in text files, and a date without month or day.
    """
    kind = values.type
    if pa.types.is_integer(kind):
        micros = _scaled(values, MICROS[unit])
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micros = _instants(values, zone)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = pc.if_else(pc.match_substring_regex(values, UNKNOWN), None, values)
        micros = _parsed(values, zone) if form is None else _parsed_by(values, zone, form)
    elif pa.types.is_null(kind):
        return pa.nulls(len(values), pa.int64())
    else:
        raise ValueError(f"type {kind} is no time; write integers, timestamps or ISO strings")
    wrong = pc.or_(pc.less(micros, EARLIEST), pc.greater(micros, LATEST))
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        fix = f" where time_unit is {unit}; set time_unit to s, ms or us"
        if not pa.types.is_integer(kind):
            fix = "; correct it, or leave it empty"
        raise ValueError(
            f"row {row}: {values[row].as_py()} lies outside the years 1898 to 2255{fix}"
        )
    return micros


def _scaled(values: pa.Array, factor: int) -> pa.Array:
    """Multiply, with clipping just beyond the limits of `to_micros` instead of overflow."""
    limit = LATEST // factor + 1
    try:
        values = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{error}; write integers that fit a signed 64-bit integer") from error
    values = pc.min_element_wise(values, limit, skip_nulls=False)
    return pc.multiply(pc.max_element_wise(values, -limit, skip_nulls=False), factor)


def _instants(values: pa.Array, zone: str) -> pa.Array:
    """Return timestamps as microseconds; those without a zone are in `zone`."""
    if values.type == pa.timestamp("us", "UTC"):
        return values.cast(pa.int64())
    if getattr(values.type, "tz", None) is None:
        # A time that the clock shows twice is the first. One that it skips tells of another zone.
        plain = values.cast(pa.timestamp("us"), safe=False)
        try:
            values = pc.assume_timezone(plain, zone, ambiguous="earliest", nonexistent="raise")
        except pa.ArrowInvalid as error:
            raise ValueError(f"{str(error).splitlines()[0]}; correct time_zone") from error
    return values.cast(pa.timestamp("us", "UTC"), safe=False).cast(pa.int64())


def _parsed(values: pa.Array, zone: str) -> pa.Array:
    """Return ISO strings as microseconds."""
    zoned = pc.match_substring_regex(values, HAS_ZONE).fill_null(False)
    parts = []
    try:
        for mask, kind in (
            (zoned, pa.timestamp("us", "UTC")),
            (pc.invert(zoned), pa.timestamp("us")),
        ):
            masked = pc.if_else(mask, values, None)
            parts.append(_instants(masked.cast(kind), zone))
    except pa.ArrowInvalid as error:
        text = str(error).partition("string: '")[2].rpartition("' as a ")[0]
        row = pc.index(values, pa.scalar(text, values.type)).as_py()
        raise ValueError(
            f"row {row}: {error}; write ISO times such as 2026-11-01T12:00:00+01:00, or integers"
        ) from error
    return pc.coalesce(*parts)


def _parsed_by(values: pa.Array, zone: str, form: str) -> pa.Array:
    """Return strings of a form of strptime as microseconds."""
    times = pc.strptime(values, form, "us", error_is_null=True)
    wrong = pc.and_(pc.is_null(times), pc.is_valid(values))
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        raise ValueError(f"row {row}: '{values[row].as_py()}' is no time of the form '{form}'")
    return _instants(times.cast(pa.timestamp("us")), zone)
