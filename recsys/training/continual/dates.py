"""Refuses partitions whose place in time cannot be right: they would block all that come later.

Partitions are trained in the order of their names. One of next year, of no date among dates, or of
rows whose date is null (Hive's `__HIVE_DEFAULT_PARTITION__`) would be the newest, and every day
that arrives after it would be late.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import unquote

from recsys.training.continual.partitions import Partition

NULL = "__HIVE_DEFAULT_PARTITION__"  # the value of rows without one, as Hive writes it
MONTH = re.compile(r"\d{4}-\d{2}")
# Clocks differ by time zone, and the day of a partition may be that of its end.
AHEAD = timedelta(days=1)
YEARS = range(1970, 2500)  # others are no years
# Lengths of digits that are dates, and their forms.
FORMS = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M"}


def refused_partitions(
    partitions: Sequence[Partition], trained: Sequence[str], now: datetime
) -> dict[str, str]:
    """Return the partitions that cannot be trained on by their names, each with the reason.

    Args:
        partitions: those of a dataset.
        trained: names of those that are trained on, whose form the others have.
        now: the time, without a zone, in UTC.

    Example::

        days = [Partition(f"date={day}") for day in ("2026-11-01", "2026-11-02", "2062-11-03")]
        refused_partitions(days, [], datetime(2026, 11, 28))  # {"date=2062-11-03": "lies ..."}
    """
    forms = [_form(name) for name in trained or [each.name for each in partitions]]
    usual = max(forms, key=forms.count, default=())
    refused = {}
    for name in (each.name for each in partitions if each.name not in trained):
        begin = date_of(name)
        if NULL in name:
            refused[name] = "has rows without a value for its level"
        elif _form(name) != usual:
            refused[name] = f"is no {'/'.join(usual)}, as the other partitions are"
        elif begin is not None and begin > now + AHEAD:
            days = (begin - now).days
            refused[name] = f"lies {days:,} days in the future; all days until then would be late"
    return refused


def date_of(name: str) -> datetime | None:
    """Return the time at which a partition begins, in UTC; None if its name has no date."""
    levels = [level.partition("=") for level in name.split("/")]
    by_level = {level.lower(): unquote(value) for level, _, value in levels}
    if "year" in by_level:
        parts = [by_level.get(level, "1").zfill(2) for level in ("year", "month", "day")]
        return _parsed("-".join(parts))
    return next(filter(None, map(_parsed, by_level.values())), None)


def _form(name: str) -> tuple[str, ...]:
    """Return what the value of each level is: date, number or text."""
    values = [unquote(level.partition("=")[2]) for level in name.split("/")]
    return tuple(
        "number" if value.isascii() and value.isdigit() else "date" if _parsed(value) else "text"
        for value in values
    )


def _parsed(value: str) -> datetime | None:
    """Return the time that a value names; of digits, that of the calendar or of Unix."""
    value = value.replace("_", "-")
    try:
        if MONTH.fullmatch(value):
            found = datetime.fromisoformat(f"{value}-01")
        elif not value.isdigit():
            found = datetime.fromisoformat(value)
        elif len(value) in FORMS and int(value[:4]) in YEARS:
            found = datetime.strptime(value, FORMS[len(value)])
        elif len(value) in (10, 13):
            found = datetime.fromtimestamp(int(value) / 10 ** (len(value) - 10), UTC)
        else:
            return None
    except ValueError:
        return None
    return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found
