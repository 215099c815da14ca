"""Days, or hours of days, by which partitions of rows are named."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from recsys.data.events.settings import EventsConfig
from recsys.data.events.times import DURATIONS, MICROS, moment

HOUR = DURATIONS["h"] * MICROS["s"]
EPOCH = date(1970, 1, 1)
Period = tuple[str, int, int]  # name, beginning, and end, in microseconds


@dataclass(frozen=True)
class Calendar:
    """Days of a time zone, or the hours since each day began, which may be 23 or 25."""

    zone: str
    unit: Literal["day", "hour"]

    @staticmethod
    def of(config: EventsConfig) -> Calendar:
        return Calendar(config.time_zone or "UTC", config.partition)

    def periods(self, day: date) -> list[Period]:
        """Return the periods of a day in order."""
        first, end = (moment(str(one), self.zone) for one in (day, day + timedelta(1)))
        if self.unit == "day":
            return [(str(day), first, end)]
        return [
            (f"{day}/hour={number:02}", begin, min(begin + HOUR, end))
            for number, begin in enumerate(range(first, end, HOUR))
        ]

    def around(self, numbers: list[int]) -> list[Period]:
        """Return the periods that days since 1970 in UTC touch."""
        days = {EPOCH + timedelta(number + shift) for number in numbers for shift in (-1, 0, 1)}
        return [period for day in sorted(days) for period in self.periods(day)]

    def end_of(self, name: str) -> int:
        """Return the end of a day, or of an hour such as 2026-11-01/05; others are a ValueError."""
        text, _, hour = name.partition("/")
        try:
            periods = self.periods(date.fromisoformat(text))
            return periods[int(hour.removeprefix("hour=")) if hour else -1][2]
        except (ValueError, IndexError) as error:
            form = "2026-11-01" + (" or 2026-11-01/05" if self.unit == "hour" else "")
            raise ValueError(f"--until {name}: no date; write such as {form}") from error

    def last_ended(self, now: int) -> str:
        """Return the last period that has ended by a time."""
        today = datetime.fromtimestamp(now / MICROS["s"], ZoneInfo(self.zone)).date()
        periods = self.periods(today - timedelta(1)) + self.periods(today)
        return [name for name, _, end in periods if end <= now][-1]
