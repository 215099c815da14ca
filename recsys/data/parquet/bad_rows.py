"""Rows that cannot be used: the first one ends the job, or all are skipped and counted.

A row is bad where one of its values cannot be used (null, NaN, an id outside its table, lists of
unequal length, an image that is none) or where its row group cannot be read. What is wrong with a
whole file (no footer, a missing column, another type) is an error in any case, as nobody can say
how many rows would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from recsys.data.filesystem import Location
from recsys.distributed.log import print_table
from recsys.distributed.ranks import Ranks

OnBadRow = Literal["error", "skip"]
LINES = 20  # of the report; metrics hold all of it

# What reads a part of a file tells of it: which of its rows are bad, what they have in common, and
# what to say about one of them.
Report = Callable[[np.ndarray, str, Callable[[int], str]], None]
# File, column, first row of the part of the file that was read at once, reason.
Place = tuple[str, str, int, str]


class BadRows:
    """Raises at the first bad row, or counts them all.

    A part of a file (a row group) may be read again in each epoch and by two ranks; it counts once.

    Example::

        bad_rows = BadRows("skip")
        bad_rows.add(file, "price", 100, np.isnan(prices), "NaN", lambda row: "NaN; write a number")
        bad_rows.summary(ranks, "train")["rows"]
    """

    def __init__(self, on_bad_row: OnBadRow = "error") -> None:
        self.on_bad_row = on_bad_row
        self.found: dict[Place, tuple[int, int]] = {}  # number of rows, the first of them

    def add(
        self,
        file: Location | str,
        column: str,
        first_row: int,
        bad: np.ndarray,
        reason: str,
        message: Callable[[int], str],
    ) -> None:
        """Take note of the bad rows of one column in a part of a file, if there are any.

        Args:
            file, column: where they are; column "" for whole rows.
            first_row: place of the part's first row in the file.
            bad: bool [rows of the part].
            reason: what they have in common.
            message: what is wrong with a row of the part, and the mend.

        Raises:
            ValueError: a row is bad and `on_bad_row` is error; names file, column and row.
        """
        if not bad.any():
            return
        row = int(bad.argmax())
        if self.on_bad_row == "error":
            where = f"column '{column}', row {first_row + row}: " if column else ""
            raise ValueError(f"{file}: {where}{message(row)}")
        self.found[str(file), column, first_row, reason] = (int(bad.sum()), first_row + row)

    def of_column(self, column: str) -> dict[Place, tuple[int, int]]:
        """Return what was found in one column."""
        return {place: rows for place, rows in self.found.items() if place[1] == column}

    def summary(self, ranks: Ranks, what: str) -> dict[str, Any]:
        """Count of all ranks; rank 0 logs them as the skipped rows of `what`. A collective.

        Returns:
            rows: number of skipped rows.
            found: by file, column and reason, each with its number of rows and the first of them.
        """
        merged: dict[Place, tuple[int, int]] = {}
        for found in ranks.gather(self.found):
            merged |= found
        total_rows, entries = by_reason(merged)
        if entries and ranks.is_first:
            print_table(format_skipped(what, total_rows, entries))
        return {"rows": total_rows, "found": entries}


def by_reason(found: dict[Place, tuple[int, int]]) -> tuple[int, list[dict[str, Any]]]:
    """Return bad rows in all, and by file, column and reason, of what `BadRows` has noted."""
    merged: dict[tuple[str, str, str], tuple[int, int]] = {}
    for (file, column, _, reason), (rows, first) in sorted(found.items()):
        # Parts come in order, so the first row of the first part stays.
        total, earliest = merged.get((file, column, reason), (0, first))
        merged[file, column, reason] = (total + rows, earliest)
    entries = [
        {"file": file, "column": column, "reason": reason, "rows": rows, "first_row": first}
        for (file, column, reason), (rows, first) in merged.items()
    ]
    return sum(rows for rows, _ in merged.values()), entries


def format_skipped(what: str, rows: int, entries: list[dict[str, Any]]) -> str:
    """Return the report as lines of text."""
    lines = [f"skipped {_rows(rows)} of {what}:"]
    for entry in entries[:LINES]:
        column = f" column '{entry['column']}'" if entry["column"] else ""
        lines.append(
            f"  {entry['file']}{column}: {entry['reason']} "
            f"({_rows(entry['rows'])}, first: row {entry['first_row']})"
        )
    if len(entries) > LINES:
        lines.append(f"  and {len(entries) - LINES:,} more")
    return "\n".join(lines)


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"
